"""The results of a sweep, cell by cell: accuracies on benchmarks, and metrics of the training."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from poweropd.evaluation.metrics import Estimate, avg_values, estimate_over_seeds, pass_values
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import OF_GRADIENTS, OF_STEPS
from poweropd.sweep import paper
from poweropd.sweep.jobs import Training

MEAN = "mean"  # the name of the mean over the benchmarks


@dataclass(frozen=True)
class BenchmarkFigures:
    """The figures of a cell on one benchmark, or their means over all; fractions and tokens."""

    k: int
    avg_at_k: Estimate
    pass_at_k: Estimate
    mean_length: float
    seeds: list[float]  # Avg@k of each seed


@dataclass(frozen=True)
class Row:
    """The results of one cell, over those of its seeds that are finished."""

    cell: str
    seeds: int
    finished: int
    failed: dict[str, str]  # run -> why
    benchmarks: dict[str, BenchmarkFigures] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    of_paper: dict[str, paper.Figures] | None = None


def table_rows(
    trainings: Sequence[Training], failed: Mapping[str, str], best: bool = False
) -> list[Row]:
    """Returns a row for each cell, from each run's last step or, if `best`, from its best one."""
    cells: dict[str, list[Training]] = {}
    for training in trainings:
        cells.setdefault(training.cell, []).append(training)
    return [_row(cell, group, failed, best) for cell, group in cells.items()]


def _row(cell: str, group: Sequence[Training], failed: Mapping[str, str], best: bool) -> Row:
    done = [training for training in group if training.is_finished()]
    found = [evaluation(training, best) for training in done]
    figures = over_seeds([one for one in found if one])
    return Row(
        cell=cell,
        seeds=len(group),
        finished=len(done),
        failed={t.name: failed[t.name] for t in group if t.name in failed},
        benchmarks=figures,
        training=_mean_by_key([of_training(training) for training in done]),
        of_paper=paper.results(group[0].config, [name for name in figures if name != MEAN]),
    )


def evaluation(training: Training, best: bool) -> dict[str, JsonObject]:
    """Returns benchmark -> results of a run's last or best step; {} if it was not evaluated."""
    found = training.directory.best() if best else None
    return training.directory.evaluation(found.step if found else training.steps)


def over_seeds(found: Sequence[JsonObject]) -> dict[str, BenchmarkFigures]:
    """Returns benchmark -> its figures over seeds and, for several benchmarks, "mean" -> theirs."""
    if not found:
        return {}
    names = list(found[0])
    averages, passes = {}, {}
    for name in names:
        correct = [_grades(one[name]) for one in found]
        averages[name] = np.array([avg_values(c) for c in correct])
        passes[name] = np.array([pass_values(c) for c in correct])
    groups = {name: [name] for name in names} | ({MEAN: names} if len(names) > 1 else {})
    return {
        title: BenchmarkFigures(
            k=found[0][group[0]]["k"],
            avg_at_k=estimate_over_seeds(*(averages[name] for name in group)),
            pass_at_k=estimate_over_seeds(*(passes[name] for name in group)),
            mean_length=statistics.fmean(o[n]["mean_length"]["mean"] for o in found for n in group),
            seeds=np.mean([averages[name].mean(1) for name in group], axis=0).tolist(),
        )
        for title, group in groups.items()
    }


def _grades(result: JsonObject) -> NDArray[np.bool_]:
    """Returns [problems, n] grades in the order of the problems' ids.

    They come from each problem's correct fraction: which of the n completions were correct is not
    kept, and no figure at k = n depends on it.
    """
    n = result["n"]
    counts = np.rint(np.array([result["solved"][id] for id in sorted(result["solved"])]) * n)
    return np.arange(n) < counts[:, None]


def of_training(training: Training) -> dict[str, float]:
    """Returns column -> number for a finished run, from its metrics and its gradients' quality."""
    rows, gradients = training.directory.metrics(), training.directory.gradient_figures()
    found = {m.column: m.sweep.summary.of(rows, m.key) for m in OF_STEPS if m.sweep}
    found |= {m.column: gradients.get(m.key) for m in OF_GRADIENTS}
    return {column: value for column, value in found.items() if value is not None}


def _mean_by_key(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for one in found for key in one)
    return {key: statistics.fmean(one[key] for one in found if key in one) for key in keys}
