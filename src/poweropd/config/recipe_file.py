"""The YAML of a recipe, its overrides, and where in them a mistake is.

Errors are `UsageError`s of one line that name the file and line, or the override.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails
from ruamel.yaml.comments import CommentedMap

from poweropd.config.bounded_yaml import LARGEST_INTEGER, MAX_BYTES, MAX_DEPTH, parse_yaml
from poweropd.errors import UsageError, one_line, shown

logger = logging.getLogger("poweropd")

# Names of keys that hold secrets; those of a chat's or model's special tokens do not.
SECRET = re.compile(
    r"^(?!.*_env$)(?!(bos|eos|pad|unk|sep|cls|mask|stop|image|begin|end)_)"
    r".*(token|secret|password|passwd|api_?key|credentials?)$",
    re.IGNORECASE,
)
TOKEN = re.compile(r"^(hf_|sk-|ghp_|xox[bp]-)[A-Za-z0-9_-]{16,}$")

# Keys of an earlier release, which are still accepted, with a notice.
RENAMED = {"teacher.give_up_after": "teacher.patience"}
LONGEST_OVERRIDE = 120  # characters of an override that a message repeats whole
# Characters that no name and no text of a recipe may have: a file's name cannot hold a NUL, and
# half a surrogate pair cannot be written.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
Key = tuple[str, ...]  # the parts of a dotted key


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping that a recipe file holds, with line numbers."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe file") from None
    except (OSError, ValueError) as error:  # also a path with a NUL
        raise UsageError(f"{one_line(str(path))}: expected a YAML file: {error}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected a mapping of sections such as model and data")
    rename_keys(tree)
    return tree


def renamed(parts: Key) -> Key:
    """Returns a key by its present name, with a notice if it had another one.

    A teacher among several has the keys of a single one, behind its name.
    """
    new = RENAMED.get(".".join((parts[0], parts[-1])))
    if new is None or len(parts) not in (2, 3):
        return parts
    key = (*parts[:-1], new.rpartition(".")[2])
    logger.warning("%s was renamed to %s", ".".join(parts), ".".join(key))
    return key


def rename_keys(tree: dict[str, Any], parts: Key = ()) -> None:
    """Renames the keys of `RENAMED` in a tree, in place; line numbers go with them."""
    for old, value in list(tree.items()):
        path = (*parts, str(old))
        *_, new = renamed(path)
        if new != old and new not in tree:  # both: the old one is refused as unknown
            tree[new] = tree.pop(old)
            if isinstance(tree, CommentedMap) and old in (tree.lc.data or {}):
                tree.lc.data[new] = tree.lc.data[old]
        if isinstance(value, dict):
            rename_keys(value, path)


def apply_override(tree: dict[str, Any], override: str) -> Key:
    """Sets "a.b=value" in the tree; the value is read as YAML. Returns the key's parts."""
    key, equals, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    said = shown(override)[1:-1] if len(override) > LONGEST_OVERRIDE else one_line(override)
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise UsageError(f"{said}: expected an override key=value, such as train.steps=100")
    parts = renamed(parts)
    value = parse_yaml(text, said, "not a YAML value")
    if isinstance(value, dict):
        rename_keys(value, parts)
    node = tree
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[parts[-1]] = value
    return parts


@dataclass(frozen=True)
class Where:
    """Says where in the user's input a key was set."""

    path: Path | None
    tree: Mapping[str, object]
    overridden: list[Key]

    def describe(self, error: ErrorDetails) -> str:
        """Returns the error as one line: where it is, the key, what was expected and got."""
        key, message = _explain(error)
        for parts in self.overridden:
            if parts == key[: len(parts)]:
                return f"override {message}"
        return f"{self._file_and_line(key)}{message}"

    def _file_and_line(self, key: Key) -> str:
        if self.path is None:
            return ""
        node: object = self.tree
        line = None
        for part in key:
            if not isinstance(node, CommentedMap) or part not in (node.lc.data or {}):
                break  # the key was set by an override, or is missing
            line = node.lc.key(part)[0] + 1
            node = node[part]
        return f"{self.path}:{line}: " if line else f"{self.path}: "


def _explain(error: ErrorDetails) -> tuple[Key, str]:
    """Returns the key that an error is about and a sentence: "train.steps: expected ..."."""
    # pydantic also names the member of a union, whose tags in sections.py are in brackets.
    key = tuple(str(part) for part in error["loc"] if not str(part).startswith("("))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return key, f"{'.'.join(key)}: this key is required"
    if error["type"] == "value_error":  # raised by a section, with the key in front
        inner = message.partition(":")[0]
        return (*key, *inner.split(".")), ".".join((*key, message))
    expected = message.replace("Input should be", "expected").replace("valid dictionary", "section")
    expected = expected.partition(" or instance of")[0]
    return key, f"{'.'.join(key)}: {expected}, got {shown(error['input'])}"


def plain(node: object) -> object:
    """Returns round-trip containers and numbers of ruamel as plain Python ones, dates as text."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return str(node) if isinstance(node, date) else node


def check_values(node: object, key: Key = ()) -> None:
    """Raises UsageError for a text with control characters, and for what is too large or deep."""
    name = one_line(shown(".".join(key), LONGEST_OVERRIDE)[1:-1])
    if len(key) > 2 * MAX_DEPTH:
        raise UsageError(f"{name}: nested too deep")
    if isinstance(node, int) and abs(node) > LARGEST_INTEGER:
        raise UsageError(f"{name}: expected an integer of at most 64 bits")
    if isinstance(node, str) and FORBIDDEN.search(node):
        raise UsageError(f"{name}: expected text without control characters, got {shown(node)}")
    pairs: Iterable[tuple[object, object]] = ()
    if isinstance(node, Mapping):
        pairs = node.items()
    elif isinstance(node, list):
        pairs = enumerate(node)
    for part, value in pairs:
        if isinstance(part, str) and FORBIDDEN.search(part):
            raise UsageError(f"{shown(part)}: expected a key without control characters")
        check_values(value, (*key, str(part)))


def refuse_secrets(tree: Mapping[str, object]) -> None:
    """Raises UsageError for a key or a value that looks like a secret.

    A recipe is copied into run directories and model cards, which are shown around.
    """
    for key, value in flatten(tree).items():
        name = str(key).rpartition(".")[2]
        if isinstance(value, str) and value and (SECRET.search(name) or TOKEN.match(value)):
            raise UsageError(
                f"{key}: expected no secret in a recipe, for it is copied into run directories and "
                "model cards: put it into an environment variable, such as HF_TOKEN"
            )


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Returns every value of nested mappings under its dotted key."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
