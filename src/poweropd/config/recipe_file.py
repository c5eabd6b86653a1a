"""A recipe's YAML, its overrides, and where in them a mistake is.

Errors are `UsageError`s of one line that name the file and line, or the override.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError

from poweropd.errors import UsageError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a recipe file holds, with line numbers."""
    try:
        tree = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a YAML file: {error}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected a mapping of sections such as model and data")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> tuple[str, ...]:
    """Sets "a.b=value" in the tree; the value is read as YAML. Returns the key's parts."""
    key, equals, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise UsageError(f"{override}: expected an override key=value, such as train.steps=100")
    try:
        value = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        raise UsageError(f"{override}: not a YAML value: {error.problem}") from None
    node = tree
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[parts[-1]] = value
    return parts


class Where:
    """Says where in the user's input a key was set."""

    def __init__(self, path: Path | None, tree: Any, overridden: list[tuple[str, ...]]) -> None:
        self.path, self.tree, self.overridden = path, tree, overridden

    def describe(self, error: ErrorDetails) -> str:
        key, message = _explain(error)
        for parts in self.overridden:
            if parts == key[: len(parts)]:
                return f"override {message}"
        return f"{self._file_and_line(key)}{message}"

    def _file_and_line(self, key: tuple[str, ...]) -> str:
        if self.path is None:
            return ""
        node, line = self.tree, None
        for part in key:
            if not isinstance(node, CommentedMap) or part not in (node.lc.data or {}):
                break  # set by an override, or missing
            line = node.lc.key(part)[0] + 1
            node = node[part]
        return f"{self.path}:{line}: " if line else f"{self.path}: "


def _explain(error: ErrorDetails) -> tuple[tuple[str, ...], str]:
    """The key an error is about and a sentence: "train.steps: expected ..., got ..."."""
    # pydantic also names the member of a union, which sections.py puts in brackets.
    key = tuple(str(part) for part in error["loc"] if not str(part).startswith("("))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return key, f"{'.'.join(key)}: this key is required"
    if error["type"] == "value_error":  # ours, with its own key in front: "alpha: expected ..."
        inner = message.partition(":")[0]
        return (*key, *inner.split(".")), ".".join((*key, message))
    expected = message.replace("Input should be", "expected").replace("valid dictionary", "section")
    expected = expected.partition(" or instance of")[0]
    return key, f"{'.'.join(key)}: {expected}, got {error['input']!r}"


def plain(node: Any) -> Any:
    """ruamel's round-trip containers and numbers as plain Python ones."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value under its dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
