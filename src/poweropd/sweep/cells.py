"""Which runs a sweep has: a cell for each combination of overrides, a run for each seed of a cell.

`--over KEY=V1,V2,...` given several times gives the product of all; `--case "KEY=V KEY=V"` adds
one cell. Every configuration is read and checked here, before anything starts.
"""

import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from poweropd.config import Config
from poweropd.errors import UsageError
from poweropd.sweep.jobs import Measurement, Training

#: Keys that are the sweep's own business, and the option that sets them.
RESERVED = {"train.seed": "--seeds", "run.dir": "--out"}
#: Keys whose value says enough in a cell's label.
SPEAKING = ("reward.name", "objective.kind")
HELD_OUT, HELD_OUT_SHARE = 64, 10  # prompts, and at most one of so many
NOT_IN_NAMES = re.compile(r"[^\w.=+-]+")


@dataclass(frozen=True)
class Cell:
    """What differs from the recipe: overrides "key=value", and the option that they came from."""

    overrides: tuple[str, ...]
    option: str

    def label(self) -> str:
        """Returns a short name, such as "alpha=0.5", "model=Qwen3-8B" or "clip"."""
        pairs = [key_and_value(override) for override in self.overrides]
        return " ".join(
            value if key in SPEAKING else f"{key.rpartition('.')[2]}={value.rpartition('/')[2]}"
            for key, value in pairs
        )


def trainings(
    recipe: Path,
    overrides: Sequence[str],
    over: Sequence[str],
    case: Sequence[str],
    seeds: int,
    out: Path,
    measure: Callable[[int], Sequence[Measurement]],
) -> list[Training]:
    """Returns the runs, all seeds of a cell together; the recipe's seed is the first.

    `measure`: what is measured of a training of so many steps. Raises UsageError, naming the
    option, for an empty sweep or a cell that is not a valid configuration or the same as another.
    """
    base = Config.load(recipe, overrides)
    if any(key_and_value(override)[0] == "run.dir" for override in overrides):
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
            if config.train.epochs is not None:
                raise UsageError(
                    f"{cell.option}: train.epochs: a sweep knows its steps beforehand: set "
                    "train.steps"
                )
            found.append(Training(label, config, measure(config.train.steps)))
        last = found[-1]
        for same in (last.config.model_dump_json(exclude={"run"}), last.config.run.dir):
            if same in seen:
                raise UsageError(f"{cell.option}: the same as {seen[same]}")
            seen[same] = cell.option
    return found


def baseline_cell(trainings: Sequence[Training], num_cases: int, named: str | None) -> str:
    """Returns the cell that the others are compared with.

    It is the one that `--baseline` names, else the first `--case`, else the first cell. Raises
    UsageError for a name that no cell has.
    """
    names = list(dict.fromkeys(training.cell for training in trainings))
    if named is None:
        return names[-num_cases] if num_cases else names[0]
    if named not in names:
        raise UsageError(f"--baseline: expected one of {', '.join(names)}, got {named}")
    return named


def expand(over: Sequence[str], case: Sequence[str]) -> list[Cell]:
    """Returns the product of all `over`, then one cell for each `case`.

    Raises UsageError for an empty sweep and for texts that are no overrides or not the user's.
    """
    if not over and not case:
        raise UsageError(
            "an empty sweep: expected --over KEY=V1,V2,... or --case 'KEY=V ...', such as "
            "--over reward.alpha=1,10,100"
        )
    products = itertools.product(*map(_axis, over)) if over else []
    cells = [Cell(point, " ".join(f"--over {one}" for one in point)) for point in products]
    for text in case:
        try:
            parts = tuple(shlex.split(text))
        except ValueError as error:
            raise UsageError(f"--case {text}: {str(error).lower()}") from None
        cells.append(Cell(parts, f"--case {shlex.quote(text)}"))
    for cell in cells:
        check_cell(cell)
    return cells


def whole_reward(overrides: Sequence[str], recipes: str) -> list[str]:
    """Returns overrides in which another reward than the recipe's starts from its own defaults.

    The recipe's alpha, say, is a parameter of the recipe's reward and of no other.
    """
    names = [v for k, v in map(key_and_value, overrides) if k == "reward.name" and v != recipes]
    rest = [o for o in overrides if not names or key_and_value(o)[0] != "reward.name"]
    return [*(f"reward={json.dumps({'name': name})}" for name in names), *rest]


def labels(cells: Sequence[Cell]) -> list[str]:
    """Returns readable and different names: short, or with whole keys if these are the same."""
    short = Counter(cell.label() for cell in cells)
    return [
        cell.label() if short[cell.label()] == 1 else " ".join(cell.overrides) for cell in cells
    ]


def key_and_value(override: str) -> tuple[str, str]:
    """Returns the two sides of "key=value"."""
    key, _, value = override.partition("=")
    return key.strip(), value.strip()


def _axis(text: str) -> list[str]:
    """Turns "key=1,2" into ["key=1", "key=2"]; commas inside [], {}, quotes do not separate."""
    wanted = f"--over {text}: expected KEY=V1,V2,... with values as in YAML"
    key, values = key_and_value(text)
    try:
        found: list[object] = YAML(typ="safe", pure=True).load(f"[{values}]")
    except YAMLError:
        raise UsageError(wanted) from None
    if not key or not found:
        raise UsageError(wanted)
    return [f"{key}={v if isinstance(v, str) else json.dumps(v)}" for v in found]


def check_cell(cell: Cell) -> None:
    """Raises UsageError for what `Config` cannot know: no overrides, or keys of the sweep."""
    if not cell.overrides or not all("=" in o for o in cell.overrides):
        raise UsageError(f"{cell.option}: expected overrides KEY=VALUE, separated by spaces")
    for key, count in Counter(key_and_value(o)[0] for o in cell.overrides).items():
        if key in RESERVED:
            raise UsageError(f"{cell.option}: {key} is set by {RESERVED[key]}")
        if count > 1:
            raise UsageError(f"{cell.option}: {key} is given twice")


def prompts_to_hold_out(count: int) -> int:
    """Returns how many of `count` prompts to keep out of training.

    Raises UsageError if they are too few.
    """
    if count < 2 * HELD_OUT_SHARE:
        raise UsageError(
            f"data.prompts: {count} prompts are too few to hold any out: set "
            "evaluate.divergence.prompts to a file of others"
        )
    return min(HELD_OUT, count // HELD_OUT_SHARE)
