"""The recommendation as a recipe: the user's own file, comments kept, with some keys set."""

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from poweropd.config import Config
from poweropd.config.recipe_file import apply_override, plain, read_yaml
from poweropd.errors import RunError
from poweropd.runs.files import write_atomically
from poweropd.tune.trials import Change

WIDTH = 100  # characters of a line
SET = "set by poweropd tune"


def write_tuned(
    recipe: Path,
    overrides: Sequence[str],
    changes: Mapping[str, Change],
    held_out: int,
    reason: str,
    path: Path,
) -> None:
    """Writes the recipe with its overrides and changes set, and the reason in front.

    Raises RunError if what was written does not load as the setting that was tried.
    """
    tree = read_yaml(recipe)
    for override in overrides:
        apply_override(tree, override)
    values = {key: change.new for key, change in changes.items()}
    if "reward.name" in values:  # the old reward's parameters are not the new one's
        tree["reward"] = CommentedMap()
    if held_out:
        values["data.holdout"] = held_out
    for key, value in values.items():
        if value is not None:
            _set(tree, key.split("."), value)
    head = textwrap.fill(
        f"poweropd tune: {reason}", WIDTH, initial_indent="# ", subsequent_indent="# "
    )
    yaml = YAML(typ="rt")
    yaml.preserve_quotes, yaml.width = True, 10 * WIDTH
    text = io.StringIO()
    yaml.dump(tree, text)
    write_atomically(path, f"{head}\n{text.getvalue()}")
    _check(recipe, overrides, values, path)


def _set(tree: dict[str, Any], parts: Sequence[str], value: object) -> None:
    """Sets a key of nested mappings, with a comment beside it that says who did."""
    node: Any = tree
    for part in parts[:-1]:
        if not isinstance(node.get(part), Mapping):
            node[part] = CommentedMap()
        node = node[part]
    node[parts[-1]] = value
    node.yaml_add_eol_comment(SET, parts[-1], column=0)


def _check(
    recipe: Path, overrides: Sequence[str], values: Mapping[str, object], path: Path
) -> None:
    """Raises RunError unless the file is the recipe with these values and nothing else changed."""
    new, old = Config.load(path).flat(), Config.load(recipe, overrides).flat()
    expected = old | dict(values)
    own = {key.partition(".")[0] for key in values} | {"run", "evaluate"}
    wrong = [
        key
        for key in {**new, **expected}
        if new.get(key) != expected.get(key) and (key in values or key.partition(".")[0] not in own)
    ]
    if wrong:
        raise RunError(
            f"{path}: expected the recipe with {json.dumps(plain(dict(values)))}, but "
            f"{', '.join(sorted(wrong))} differ: set these keys in {recipe} yourself"
        )
