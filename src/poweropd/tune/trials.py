"""Which settings are tried: rewards times learning rates, the recipe's own among them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from poweropd.config import Config
from poweropd.config.evaluate import DivergenceConfig
from poweropd.errors import UsageError
from poweropd.runs.metrics import OF_BENCHMARKS, OF_DIVERGENCE, Metric
from poweropd.sweep import cells
from poweropd.sweep.jobs import Measurement, Training
from poweropd.training.build import RunInputs

ALPHAS = (0.5, 5.0, 50.0, 500.0)
VANILLA = "log_ratio"  # tried beside them: power's limit as alpha goes to 0
FACTOR = 4.0  # between two learning rates; the first two are the recipe's and this times it
CHECKPOINTS = 4  # of a trial, to go on from
RATE = "train.learning_rate"
#: The metrics that can decide; a benchmark's accuracy needs benchmarks in the recipe.
DECIDING: dict[str, Metric] = {**OF_DIVERGENCE, "avg_at_k": OF_BENCHMARKS["avg_at_k"]}


@dataclass(frozen=True)
class Search:
    """What is tried; without alphas, rates or cases, the defaults. Cases are those of a sweep."""

    steps: int = 32
    batches: int = 8  # of the gradient's signal-to-noise ratio; 0: it is not measured
    metric: str = "reverse_kl"
    alphas: Sequence[float] = ()
    rates: Sequence[float] = ()
    cases: Sequence[str] = ()


@dataclass(frozen=True)
class Change:
    """The value of a key in the recipe, and in a trial."""

    old: object
    new: object

    @property
    def factor(self) -> float:
        """Returns the logarithm of how many times larger or smaller a number became, else 0."""
        numbers = [x for x in (self.old, self.new) if isinstance(x, int | float) and x > 0]
        return abs(math.log(numbers[1] / numbers[0])) if len(numbers) == 2 else 0.0


@dataclass(frozen=True)
class Trial:
    """One setting: its training, and the keys in which it differs from the recipe."""

    training: Training
    changes: Mapping[str, Change]
    case: str  # the overrides that make it, without its learning rate

    @property
    def rate(self) -> float:
        """Returns its learning rate."""
        return self.training.config.train.learning_rate

    @property
    def label(self) -> str:
        """Returns the reward and the learning rate, such as "power, alpha 5, at 5e-07"."""
        return f"{self.reward}, at {self.rate:g}"

    @property
    def reward(self) -> str:
        """Returns the reward, and the objective if it is not the plain one."""
        config = self.training.config
        reward = config.reward.model_dump()
        alpha = (
            f", alpha {reward['alpha']:g}" if isinstance(reward.get("alpha"), int | float) else ""
        )
        kind = "" if config.objective.kind == "sampled" else f", {config.objective.kind}"
        return f"{config.reward.name}{alpha}{kind}"

    @property
    def size(self) -> tuple[int, float]:
        """Returns how much is changed: how many settings, then by how large factors."""
        settings = {"reward" if key.startswith("reward.") else key for key in self.changes}
        return len(settings), sum(change.factor for change in self.changes.values())


def trials(
    recipe: Path, overrides: Sequence[str], search: Search, out: Path, more: Sequence[str] = ()
) -> tuple[list[Trial], int]:
    """Returns the trials, the recipe's own setting first, and the held-out prompts if set here.

    more: the overrides of further trials, as `at_rate` makes them.

    Raises UsageError for a recipe that cannot be tuned in this way.
    """
    base = Config.load(recipe, overrides)
    held_out = _held_out(base, search)
    shared = [*overrides, *_shared(base, search, held_out)]
    cases = list(dict.fromkeys([*_cases(base, search), *more]))
    found = cells.trainings(recipe, shared, [], cases, 1, out, lambda steps: [])
    made = []
    rewards = set[str]()
    for number, (training, case) in enumerate(zip(found, cases, strict=True)):
        config = training.config
        evaluate = config.evaluate
        if number and evaluate is not None:  # it is the same student before every trial
            section = evaluate.model_copy(update={"before": False})
            config = config.model_copy(update={"evaluate": section})
        reward = reward_text(config)
        batches = search.batches if reward not in rewards else 0
        rewards.add(reward)
        measurements = [Measurement(0, batches)] if batches else []
        whole = Training(training.cell, config, measurements, trial=True)
        changes = _changes(found[0].config, config)
        made.append(Trial(whole, changes, re.sub(rf"\s*{RATE}=\S+", "", case).strip()))
    return made, held_out


def reward_text(config: Config) -> str:
    """Returns the reward and the objective as one text, the same for trials that share both."""
    return f"{config.reward.model_dump_json()} {config.objective.model_dump_json()}"


def _cases(base: Config, search: Search) -> list[str]:
    """Returns the overrides of every trial: each reward at each rate, the recipe's own first."""
    alpha = base.reward.model_dump().get("alpha")
    own = "" if base.reward.name != "power" else "reward.name=power"
    if isinstance(alpha, int | float):
        own = f"reward.alpha={alpha:g}"
    named = "" if base.reward.name == "power" else "reward.name=power "
    grid = [a for a in search.alphas or ALPHAS if named or a != alpha]
    others = search.cases or [f"reward.name={VANILLA}"]
    if base.reward.name == VANILLA and not search.cases:
        others = []
    wanted = [own, *(f"{named}reward.alpha={a:g}" for a in grid), *others]
    rate = base.train.learning_rate
    rates = [rate, *(search.rates or [rate * FACTOR])]
    return [case if RATE in case else at_rate(case, value) for value in rates for case in wanted]


def at_rate(case: str, rate: float) -> str:
    """Returns the overrides of a case at a learning rate."""
    return f"{case} {RATE}={rate:.6g}".strip()


def _shared(base: Config, search: Search, held_out: int) -> list[str]:
    """Returns the overrides that make a short run of the recipe, evaluated at its end."""
    steps = search.steps
    evaluate = {} if base.evaluate is None else base.evaluate.model_dump()
    evaluate |= {"every": steps, "before": True, "teacher": False, "best": search.metric}
    if search.metric in OF_DIVERGENCE:
        evaluate["benchmarks"] = []
        evaluate["divergence"] = evaluate.get("divergence") or DivergenceConfig().model_dump()
    else:
        evaluate["divergence"] = None
    checkpoint = {"every": math.ceil(steps / CHECKPOINTS), "keep": 1}
    return [
        f"train.steps={steps}",
        "train.epochs=null",
        "train.schedule=constant",  # the rate that is judged is the peak
        f"train.warmup_steps={min(base.train.warmup_steps, steps // CHECKPOINTS)}",
        f"checkpoint={json.dumps(checkpoint)}",
        f"evaluate={json.dumps(evaluate)}",
        "log.trackers=[]",
        *([f"data.holdout={held_out}"] if held_out else []),
    ]


def _held_out(base: Config, search: Search) -> int:
    """Returns how many prompts to hold out; 0 if the recipe says so itself or no metric needs it.

    Everything that can be checked without weights is checked here, before any process starts.
    """
    if search.metric not in DECIDING:
        raise UsageError(f"--metric: expected one of {', '.join(DECIDING)}, got {search.metric}")
    count = len(RunInputs.load(base, notify=False).prompts)
    if search.metric not in OF_DIVERGENCE:
        if base.evaluate is None or not base.evaluate.benchmarks:
            raise UsageError(
                f"--metric: {search.metric} needs evaluate.benchmarks in the recipe; without "
                "answers, leave it out: the divergence from the teacher decides"
            )
        return 0
    named = base.evaluate is not None and base.evaluate.divergence is not None
    if base.data.holdout or named:
        return 0
    return cells.prompts_to_hold_out(count)


def _changes(base: Config, config: Config) -> dict[str, Change]:
    """Returns the keys whose values differ, but for those that say where and how it is run."""
    old, new = base.flat(), config.flat()
    return {
        key: Change(old.get(key), new.get(key))
        for key in {**old, **new}
        if old.get(key) != new.get(key) and key.partition(".")[0] not in ("run", "evaluate")
    }
