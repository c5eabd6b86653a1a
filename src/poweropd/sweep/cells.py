"""Which runs a sweep has: a cell for each combination of overrides, a run for each seed of a cell.

`--over KEY=V1,V2,...` given several times gives the product of all; `--case "KEY=V KEY=V"` adds
one cell. Every configuration is read and checked here, before anything starts.
"""

import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from poweropd.config import Config
from poweropd.errors import UsageError
from poweropd.runs.directory import RunDirectory

#: Keys that are the sweep's own business, and the option that sets them.
RESERVED = {"train.seed": "--seeds", "run.dir": "--out"}
#: Keys whose value says enough in a cell's label.
SPEAKING = ("reward.name", "objective.kind")
NOT_IN_NAMES = re.compile(r"[^\w.=+-]+")


@dataclass(frozen=True)
class Cell:
    """What differs from the recipe: overrides "key=value", and the option they came from."""

    overrides: tuple[str, ...]
    option: str

    def label(self, short: bool = True) -> str:
        """Such as "alpha=0.5" or "model=Qwen3-8B"; with whole keys and paths unless `short`."""
        return " ".join(_label(override, short) for override in self.overrides)


@dataclass(frozen=True)
class Training:
    """One run of a sweep."""

    cell: str  # its label
    seed: int
    config: Config

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.config.run.dir)

    @property
    def name(self) -> str:
        return self.directory.path.name

    @property
    def steps(self) -> int:
        return self.config.train.steps

    def is_finished(self, snr: int) -> bool:
        return self.directory.final.exists() and (not snr or "end" in self.directory.gradients())


def trainings(
    recipe: Path,
    overrides: Sequence[str],
    over: Sequence[str],
    case: Sequence[str],
    seeds: int,
    out: Path,
) -> list[Training]:
    """The runs, all seeds of a cell together; the seeds are the recipe's and those after it.

    Raises UsageError, naming the option, for an empty sweep or a cell that is not a valid
    configuration or the same as another.
    """
    base = Config.load(recipe, overrides)
    if any(override_key(o) == "run.dir" for o in overrides):
        raise UsageError("run.dir: a sweep names its runs' directories; use --out")
    cells = expand(over, case)
    found, seen = [], dict[str, str]()
    for cell, label in zip(cells, labels(cells), strict=True):
        for seed in range(base.train.seed, base.train.seed + seeds):
            own = whole_reward(cell.overrides, base.reward.name)
            folder = out / f"{NOT_IN_NAMES.sub('-', label)}-seed{seed}"
            placed = [f"train.seed={seed}", f"run.dir={json.dumps(str(folder))}"]
            try:
                config = Config.load(recipe, [*overrides, *own, *placed])
            except UsageError as error:
                raise UsageError(f"{cell.option}: {error}") from None
            found.append(Training(label, seed, config))
        last = found[-1]
        for same in (last.config.model_dump_json(exclude={"run"}), last.config.run.dir):
            if same in seen:
                raise UsageError(f"{cell.option}: the same as {seen[same]}")
            seen[same] = cell.option
    return found


def expand(over: Sequence[str], case: Sequence[str]) -> list[Cell]:
    """The product of all `over`, then one cell for each `case`."""
    if not over and not case:
        raise UsageError(
            "an empty sweep: expected --over KEY=V1,V2,... or --case 'KEY=V ...', such as "
            "--over reward.alpha=1,10,100"
        )
    axes = [_axis(text) for text in over]
    products = itertools.product(*axes) if axes else []
    cells = [Cell(point, _options(point)) for point in products]
    for text in case:
        try:
            parts = tuple(shlex.split(text))
        except ValueError as error:
            raise UsageError(f"--case {text}: {str(error).lower()}") from None
        cells.append(Cell(parts, f"--case {shlex.quote(text)}"))
    for cell in cells:
        _check(cell)
    return cells


def whole_reward(overrides: Sequence[str], recipes: str) -> list[str]:
    """Overrides in which another reward than the recipe's starts from that reward's defaults.

    The recipe's alpha, say, is a parameter of its own reward and of no other.
    """
    names = [override_value(o) for o in overrides if override_key(o) == "reward.name"]
    if not names or names[-1] == recipes:
        return list(overrides)
    rest = [o for o in overrides if override_key(o) != "reward.name"]
    return [f"reward={json.dumps({'name': names[-1]})}", *rest]


def labels(cells: Sequence[Cell]) -> list[str]:
    """Readable and different names: short where these differ."""
    short = Counter(cell.label() for cell in cells)
    return [cell.label(short[cell.label()] == 1) for cell in cells]


def override_key(override: str) -> str:
    return override.partition("=")[0].strip()


def override_value(override: str) -> str:
    return override.partition("=")[2].strip()


def _label(override: str, short: bool) -> str:
    if not short:
        return override
    if override_key(override) in SPEAKING:
        return override_value(override)
    return (
        f"{override_key(override).rpartition('.')[2]}={override_value(override).rpartition('/')[2]}"
    )


def _options(point: Sequence[str]) -> str:
    return " ".join(f"--over {override}" for override in point)


def _axis(text: str) -> list[str]:
    """ "key=1,2" -> ["key=1", "key=2"]; commas inside [], {} and quotes do not separate."""
    wanted = f"--over {text}: expected KEY=V1,V2,... with values as in YAML"
    try:
        values: list[Any] = YAML(typ="safe", pure=True).load(f"[{override_value(text)}]")
    except YAMLError:
        raise UsageError(wanted) from None
    if not override_key(text) or not values:
        raise UsageError(wanted)
    return [f"{override_key(text)}={v if isinstance(v, str) else json.dumps(v)}" for v in values]


def _check(cell: Cell) -> None:
    """What `Config` cannot know: keys that are the sweep's, overrides that are none."""
    if not cell.overrides or not all("=" in o for o in cell.overrides):
        raise UsageError(f"{cell.option}: expected overrides KEY=VALUE, separated by spaces")
    keys = [override_key(override) for override in cell.overrides]
    for key in keys:
        if key in RESERVED:
            raise UsageError(f"{cell.option}: {key} is set by {RESERVED[key]}")
    twice = [key for key, n in Counter(keys).items() if n > 1]
    if twice:
        raise UsageError(f"{cell.option}: {twice[0]} is given twice")
