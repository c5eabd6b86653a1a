"""The trainings of a bench: each setting at several rates, then at its best with further seeds."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poweropd.config import Config
from poweropd.config.evaluate import HELD_OUT, DivergenceConfig
from poweropd.embedded import EMBEDDED_PREFIX
from poweropd.errors import UsageError
from poweropd.sweep import cells
from poweropd.sweep.bench.settings import PLAIN, SETTINGS
from poweropd.sweep.forgetting import other_prompts
from poweropd.sweep.jobs import Measurement, Training
from poweropd.training.build import RunInputs

KL, ACCURACY = "reverse_kl", "avg_at_k"  # either decides which learning rate is the best
FACTOR = 3.0  # between two learning rates; the first two are the recipe's and this times it
WIDER = 4  # further rates of a setting
CHECKPOINTS = 4  # of a training, to go on from
#: Prompts outside the embedded task, on which forgetting is measured there.
EMBEDDED_OTHER = f"{EMBEDDED_PREFIX}other"
#: Learning rate -> held-out reverse KL, or 1 - accuracy; infinite if the training diverged.
Rates = Mapping[float, float]


@dataclass(frozen=True)
class Bench:
    """What is compared, from which start, and how much of it.

    settings: name -> overrides. batches: of the gradient's signal-to-noise ratio; 0: none. other:
    prompts on which forgetting is measured; "": none. metric: KL or ACCURACY, which decides the
    learning rates. Creating one checks what can be checked without weights, and raises UsageError.
    """

    recipe: Path
    overrides: Sequence[str]
    settings: Mapping[str, Sequence[str]]
    out: Path
    seeds: int = 5
    batches: int = 4
    other: str = ""
    metric: str = KL
    base: Config = field(init=False)
    held_out: int = field(init=False)  # prompts, where the recipe holds none out

    def __post_init__(self) -> None:
        base = Config.load(self.recipe, self.overrides)
        if any(cells.key_and_value(one)[0] == "run.dir" for one in self.overrides):
            raise UsageError("run.dir: a bench names its runs' directories; use --out")
        if base.train.epochs is not None:
            raise UsageError("train.epochs: a bench knows its steps beforehand: set train.steps")
        if self.metric not in (KL, ACCURACY):
            raise UsageError(f"--metric: expected {KL} or {ACCURACY}, got {self.metric}")
        if self.metric == ACCURACY and not (base.evaluate and base.evaluate.benchmarks):
            raise UsageError(f"--metric: {ACCURACY} needs evaluate.benchmarks in the recipe")
        inputs = RunInputs.load(base, notify=False)
        if self.other:
            other_prompts(base, inputs, self.other)
        held_out = 0 if base.data.holdout else cells.prompts_to_hold_out(len(inputs.prompts))
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "held_out", held_out)

    def at_rate(self, setting: str, rate: float) -> Training:
        """Returns the training that says how good a learning rate is for a setting."""
        evaluate = self._evaluate() | {"teacher": False}
        evaluate["divergence"] = evaluate["divergence"] | {"prompts": HELD_OUT, "limit": None}
        if self.metric == KL:
            evaluate["benchmarks"] = []
        return self._training(setting, rate, self.base.train.seed, evaluate)

    def with_seeds(self, best: Mapping[str, float]) -> list[Training]:
        """Returns the trainings of every setting at its best rate, all settings of a seed together.

        Their seeds are not the one by which the rates were chosen. The first training also
        evaluates the student before it and, if the recipe says so, the teacher.
        """
        steps, local = self.base.train.steps, self.base.teacher.place == "in process"
        start = Measurement(0, self.batches, cosine=local and not self.base.only_teacher.offload)
        measurements = [start] if self.batches else []
        measurements += [Measurement(steps, other=self.other)] if self.other else []
        found = list[Training]()
        for seed in range(self.base.train.seed + 1, self.base.train.seed + 1 + self.seeds):
            for setting, rate in best.items():
                evaluate = self._evaluate() | {"before": not found}
                evaluate["teacher"] = evaluate["teacher"] and not found
                found.append(self._training(setting, rate, seed, evaluate, measurements))
        return found

    def _evaluate(self) -> dict[str, Any]:
        """Returns the recipe's section for one evaluation, at the end, also of the divergence."""
        section = self.base.evaluate
        found = {"teacher": False} if section is None else section.model_dump()
        divergence = found.get("divergence") or DivergenceConfig().model_dump()
        end = {"every": self.base.train.steps, "before": False, "best": KL}
        return {**found, **end, "divergence": divergence}

    def _training(
        self,
        setting: str,
        rate: float,
        seed: int,
        evaluate: Mapping[str, object],
        measurements: Sequence[Measurement] = (),
    ) -> Training:
        name = f"{cells.NOT_IN_NAMES.sub('-', setting)}-rate={rate:g}-seed{seed}"
        every = math.ceil(self.base.train.steps / CHECKPOINTS)
        own = [
            *self.overrides,
            *PLAIN,
            *self.settings[setting],
            *([f"data.holdout={self.held_out}"] if self.held_out else []),
            f"evaluate={json.dumps(evaluate)}",
            f"checkpoint={json.dumps({'every': every, 'keep': 1})}",
            "log.trackers=[]",
            f"train.learning_rate={rate:g}",
            f"train.seed={seed}",
            f"run.dir={json.dumps(str(self.out / name))}",
        ]
        return Training(setting, Config.load(self.recipe, own), measurements, trial=True)


def chosen_settings(
    recipe: Path, overrides: Sequence[str], only: Sequence[str], case: Sequence[str]
) -> tuple[dict[str, Sequence[str]], dict[str, str]]:
    """Returns name -> overrides of what is compared, and name -> why of what cannot be.

    only: names of SETTINGS; all if empty. case: further ones, as those of a sweep. What the recipe
    cannot do, such as the whole vocabulary of a served teacher, is left out unless it was named.
    Raises UsageError for a name that there is not, and for a case that is no valid configuration.
    """
    reward = Config.load(recipe, overrides).reward.name
    unknown = [name for name in only if name not in SETTINGS]
    if unknown:
        raise UsageError(f"--only: expected names of {', '.join(SETTINGS)}, got {unknown[0]}")
    found, left_out = dict[str, Sequence[str]](), dict[str, str]()
    for name in only or SETTINGS:
        try:
            Config.load(recipe, [*overrides, *PLAIN, *SETTINGS[name]])
            found[name] = SETTINGS[name]
        except UsageError as error:
            if only:
                raise UsageError(f"--only {name}: {error}") from None
            left_out[name] = str(error)
    wanted = cells.expand([], case) if case else []
    for cell, name in zip(wanted, cells.labels(wanted), strict=True):
        own = cells.whole_reward(cell.overrides, reward)
        try:
            Config.load(recipe, [*overrides, *PLAIN, *own])
        except UsageError as error:
            raise UsageError(f"{cell.option}: {error}") from None
        if name in found:
            raise UsageError(f"{cell.option}: {name} is compared already")
        found[name] = own
    return found, left_out


def default_other(base: Config) -> str:
    """Returns the prompts on which forgetting is measured if none are named; "" for none."""
    return EMBEDDED_OTHER if base.data.prompts.startswith(EMBEDDED_PREFIX) else ""


def first_rates(rate: float) -> list[float]:
    """Returns the learning rates that every setting is tried at."""
    return [rate, _rounded(rate * FACTOR)]


def further_rate(tried: Rates) -> float | None:
    """Returns the next learning rate to try; None if the best one has one at either side.

    The search also ends after WIDER further rates.
    """
    best = best_rate(tried)
    if len(tried) >= 2 + WIDER:
        return None
    if best is None or best == min(tried):
        return _rounded(min(tried) / FACTOR)
    return _rounded(max(tried) * FACTOR) if best == max(tried) else None


def best_rate(tried: Rates) -> float | None:
    """Returns the learning rate with the lowest value; None if all diverged."""
    best = min(tried, key=tried.__getitem__)
    return None if math.isinf(tried[best]) else best


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
