"""What a bench found: the figures of every setting, their differences, and what they cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from poweropd.evaluation.divergence import PromptTotals
from poweropd.evaluation.intervals import Estimate, paired_ratios_over_seeds, ratio_over_seeds
from poweropd.runs.files import read_json
from poweropd.runs.metrics import LARGEST, MEDIAN, Aggregate, Shown
from poweropd.sweep import comparison, results
from poweropd.sweep.bench.settings import QUESTIONS, Question
from poweropd.sweep.bench.trials import KL, Rates, best_rate
from poweropd.sweep.forgetting import RESULTS
from poweropd.sweep.jobs import Training

#: Metric of the training, or of its gradients -> how the bench shows it.
SIGNALS = {
    "start.gradient_snr": Shown("SNR", ".2f"),
    "start.gradient_cosine": Shown("cosine", ".2f"),
    "log_ratio/far_fraction": Shown("far, %", ".1f", factor=100.0),
    "reward/min": Shown("lowest reward", ".3g", Aggregate(min)),
    "reward/zero_fraction": Shown("reward 0, %", ".1f", factor=100.0),
    "grad_norm": Shown("grad norm", ".3g", MEDIAN),
    "completions/mean_length": Shown("length", ".1f"),
    "entropy": Shown("entropy", ".3f"),
    "seconds/step": Shown("s a step", ".2f", MEDIAN),
    "memory/peak_bytes": Shown("GiB", ".2f", LARGEST, factor=2.0**-30),
}
Totals = Mapping[str, PromptTotals]
Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Found:
    """The finished trainings of a setting by their seeds, without those that diverged."""

    runs: Mapping[int, Training]
    diverged: Sequence[int] = ()

    @classmethod
    def of(cls, trainings: Sequence[Training]) -> "Found":
        """Sorts the trainings of one setting."""
        finished = [one for one in trainings if one.is_finished()]
        runs = {one.seed: one for one in finished if not one.diverged()}
        return cls(runs, [one.seed for one in finished if one.diverged()])

    def graded(self) -> comparison.CellResults:
        """Returns the evaluations on benchmarks, as those of a sweep's cell."""
        return results.graded_cell([*self.runs.values()], best=False)

    def held_out(self) -> dict[int, Totals]:
        """Returns the sums of each held-out prompt by seed."""
        runs = self.runs.items()
        return {s: run.directory.divergence_facts(run.steps)["per_prompt"] for s, run in runs}

    def from_start(self) -> dict[int, Totals]:
        """Returns the sums of each of the other prompts by seed; {} if there are none."""
        found = {}
        for seed, run in self.runs.items():
            for one in [one for one in run.measurements if one.other]:
                found[seed] = read_json(run.forgetting_folder(one) / RESULTS)["per_prompt"]
        return found

    def signals(self) -> dict[str, float]:
        """Returns the means over seeds of what SIGNALS shows."""
        found: dict[str, list[float]] = {key: [] for key in SIGNALS}
        for run in self.runs.values():
            rows, gradients = run.directory.metrics(), run.directory.gradient_figures()
            for key, shown in SIGNALS.items():
                value = gradients.get(key, shown.summary.of(rows, key))
                found[key] += [] if value is None else [value]
        return {key: fmean(values) for key, values in found.items() if values}


@dataclass(frozen=True)
class Difference:
    """One setting minus another: accuracy by benchmark (as a fraction) and held-out divergence.

    Paired by seed and by problem or prompt. None: no seed has both.
    """

    accuracy: dict[str, Estimate]
    divergence: Estimate | None


@dataclass(frozen=True)
class SettingFigures:
    """The figures of one setting. rates: each one tried -> its value, None if it diverged."""

    setting: str
    rate: float | None
    rates: dict[str, float | None]
    seeds: list[int]
    diverged: list[int]
    accuracy: dict[str, Estimate] = field(default_factory=dict)
    divergence: Estimate | None = None
    forgetting: Estimate | None = None
    signals: dict[str, float] = field(default_factory=dict)
    minus_baseline: Difference | None = None


@dataclass(frozen=True)
class Answer:
    """A question, and the difference that answers it."""

    question: Question
    difference: Difference


@dataclass(frozen=True)
class BenchResults:
    """All that a bench found; `before` and `teacher` are accuracies, and a divergence.

    metric: which decided the learning rates, by the held-out reverse KL or 1 - accuracy.
    """

    baseline: str
    metric: str
    rows: list[SettingFigures]
    answers: list[Answer]
    before: dict[str, float]
    teacher: dict[str, float]
    cost: dict[str, dict[str, float]]


def bench_results(
    tried: Mapping[str, Rates],
    metric: str,
    trainings: Sequence[Training],
    costs: Sequence[Mapping[str, object]],
) -> BenchResults:
    """Returns what is known so far. tried: setting -> its rates, the baseline first."""
    own = {name: Found.of([one for one in trainings if one.cell == name]) for name in tried}
    baseline = next(iter(tried))
    rows = [
        _setting_figures(name, tried[name], found, own[baseline]) for name, found in own.items()
    ]
    asked = [q for q in QUESTIONS if q.first in own and q.second in own]
    answers = [Answer(q, difference_between(own[q.first], own[q.second])) for q in asked]
    first = trainings[0].directory if trainings else None
    before = {} if first is None else _mean_accuracies(first.evaluation(0))
    if first is not None and (kl := first.divergence(0)):
        before["divergence"] = kl[KL]["mean"]
    teacher = {} if first is None else _mean_accuracies(first.teacher_evaluation())
    return BenchResults(baseline, metric, rows, answers, before, teacher, _costs(costs))


def rate_figures(trainings: Sequence[Training], metric: str) -> dict[float, float]:
    """Returns what the choice of a rate is made from, by the metric, of finished trainings."""
    found = {}
    for one in [one for one in trainings if one.is_finished()]:
        value = math.inf
        if not one.diverged() and metric == KL:
            value = one.directory.divergence(one.steps)[KL]["mean"]
        elif not one.diverged():
            own = _mean_accuracies(one.directory.evaluation(one.steps))
            value = 1 - own.get(comparison.MEAN, next(iter(own.values())))
        found[one.config.train.learning_rate] = value
    return found


def difference_between(a: Found, b: Found) -> Difference:
    """Returns a - b."""
    graded = (a.graded(), b.graded())
    names = list(dict.fromkeys(n for one in graded[0].by_seed.values() for n in one))
    pairs = {
        name: comparison.paired_difference(*graded, group, "avg_at_k")
        for name, group in comparison.benchmark_groups(names).items()
    }
    accuracy = {name: pair for name, pair in pairs.items() if pair is not None}
    one, other = a.held_out(), b.held_out()
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return Difference(accuracy, None)
    return Difference(accuracy, paired_ratios_over_seeds(_pair(one, seeds), _pair(other, seeds)))


def _setting_figures(name: str, rates: Rates, found: Found, baseline: Found) -> SettingFigures:
    best = best_rate(rates) if rates else None
    shown = {f"{rate:g}": None if math.isinf(kl) else kl for rate, kl in sorted(rates.items())}
    row = SettingFigures(name, best, shown, [*found.runs], [*found.diverged])
    if not found.runs:
        return row
    benchmarks = results.over_seeds([*found.graded().by_seed.values()])
    moved = found.from_start()
    return SettingFigures(
        **vars(row)
        | {
            "accuracy": {name: figures.avg_at_k for name, figures in benchmarks.items()},
            "divergence": ratio_over_seeds(*_pair(found.held_out(), [*found.runs])),
            "forgetting": ratio_over_seeds(*_pair(moved, [*moved])) if moved else None,
            "signals": found.signals(),
            "minus_baseline": None if found is baseline else difference_between(found, baseline),
        }
    )


def _pair(by_seed: Mapping[int, Totals], seeds: Sequence[int]) -> Pair:
    """Returns the sums of the reverse KL and of its tokens, [seeds, prompts] each.

    Prompts are in the order of their ids. The rows that data.holdout keeps out are others for each
    seed; then a column holds as many different prompts as there are seeds, and is still a sample.
    """
    own = [[by_seed[seed][id] for id in sorted(by_seed[seed])] for seed in seeds]
    sums = np.array([[one["reverse_kl"] for one in row] for row in own])
    return sums, np.array([[one["tokens"] for one in row] for row in own], dtype=np.float64)


def _mean_accuracies(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Returns benchmark -> accuracy and, if there are several, their mean."""
    own = {name: result["avg_at_k"]["mean"] for name, result in found.items()}
    return own | ({comparison.MEAN: fmean(own.values())} if len(own) > 1 else {})


def _costs(costs: Sequence[Mapping[str, object]]) -> dict[str, dict[str, float]]:
    """Adds up the lines of the costs by their stage."""
    found: dict[str, dict[str, float]] = {}
    for line in costs:
        into = found.setdefault(str(line["stage"]), {"runs": 0, "cpu_seconds": 0, "seconds": 0})
        for key in into:
            into[key] += float(str(line[key]))
    return found
