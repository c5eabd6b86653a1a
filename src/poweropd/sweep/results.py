"""The results of a sweep, cell by cell: accuracies on benchmarks, and metrics of the training."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from poweropd.evaluation.metrics import Estimate, estimate_over_seeds
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import OF_GRADIENTS, OF_STEPS
from poweropd.sweep import comparison, paper
from poweropd.sweep.jobs import Training


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
    #: Benchmark -> Avg@k minus that of the baseline; the baseline itself has none.
    minus_baseline: dict[str, Estimate] = field(default_factory=dict)
    #: Benchmark -> the metrics by which this cell is better than every other one for sure.
    best: dict[str, list[str]] = field(default_factory=dict)


def table_rows(
    trainings: Sequence[Training],
    failed: Mapping[str, str],
    best: bool = False,
    baseline: str | None = None,
) -> list[Row]:
    """Returns a row for each cell, from each run's last step or, if `best`, from its best one.

    `baseline`: the cell that the others are compared with; None means no comparison.
    """
    cells: dict[str, list[Training]] = {}
    for training in trainings:
        cells.setdefault(training.cell, []).append(training)
    graded = {cell: graded_cell(group, best) for cell, group in cells.items()}
    rows = [_row(cell, group, failed, graded[cell]) for cell, group in cells.items()]
    return compared(rows, graded, baseline)


def graded_cell(group: Sequence[Training], best: bool) -> comparison.CellResults:
    """Returns the evaluations of a cell's finished runs."""
    found = {run.seed: evaluation(run, best) for run in group if run.is_finished()}
    return comparison.CellResults({seed: one for seed, one in found.items() if one})


def compared(rows: Sequence[Row], graded: comparison.Cells, baseline: str | None) -> list[Row]:
    """Returns the rows with their differences from the baseline and with what is best for sure."""
    names = list(dict.fromkeys(n for row in rows for n in row.benchmarks if n != comparison.MEAN))
    groups = comparison.benchmark_groups(names)
    winners = {
        (name, key): comparison.best_cell(graded, group, key)
        for name, group in groups.items()
        for key in comparison.VALUES
    }
    found = []
    for row in rows:
        against = graded[baseline] if baseline is not None and row.cell != baseline else None
        pairs = {
            name: comparison.paired_difference(graded[row.cell], against, group, "avg_at_k")
            for name, group in groups.items()
            if against is not None
        }
        won = [column for column, cell in winners.items() if cell == row.cell]
        best = {name: [key for n, key in won if n == name] for name in groups}
        found.append(
            replace(
                row,
                minus_baseline={name: pair for name, pair in pairs.items() if pair is not None},
                best={name: keys for name, keys in best.items() if keys},
            )
        )
    return found


def _row(
    cell: str,
    group: Sequence[Training],
    failed: Mapping[str, str],
    graded: comparison.CellResults,
) -> Row:
    done = [training for training in group if training.is_finished()]
    figures = over_seeds([*graded.by_seed.values()])
    return Row(
        cell=cell,
        seeds=len(group),
        finished=len(done),
        failed={t.name: failed[t.name] for t in group if t.name in failed},
        benchmarks=figures,
        training=_mean_by_key([of_training(training) for training in done]),
        of_paper=paper.results(
            group[0].config, [name for name in figures if name != comparison.MEAN]
        ),
    )


def evaluation(training: Training, best: bool) -> dict[str, JsonObject]:
    """Returns benchmark -> results of a run's last or best step; {} if it was not evaluated."""
    found = training.directory.best() if best else None
    return training.directory.evaluation(found.step if found else training.steps)


def over_seeds(found: Sequence[Mapping[str, JsonObject]]) -> dict[str, BenchmarkFigures]:
    """Returns benchmark -> its figures over seeds and, for several benchmarks, "mean" -> theirs."""
    if not found:
        return {}
    names = list(found[0])
    averages, passes = {}, {}
    for name in names:
        averages[name] = np.array([comparison.VALUES["avg_at_k"](one[name]) for one in found])
        passes[name] = np.array([comparison.VALUES["pass_at_k"](one[name]) for one in found])
    return {
        title: BenchmarkFigures(
            k=found[0][group[0]]["k"],
            avg_at_k=estimate_over_seeds(*(averages[name] for name in group)),
            pass_at_k=estimate_over_seeds(*(passes[name] for name in group)),
            mean_length=statistics.fmean(o[n]["mean_length"]["mean"] for o in found for n in group),
            seeds=np.mean([averages[name].mean(1) for name in group], axis=0).tolist(),
        )
        for title, group in comparison.benchmark_groups(names).items()
    }


def of_training(training: Training) -> dict[str, float]:
    """Returns column -> number for a finished run, from its metrics and its gradients' quality."""
    rows, gradients = training.directory.metrics(), training.directory.gradient_figures()
    found = {m.column: m.sweep.summary.of(rows, m.key) for m in OF_STEPS if m.sweep}
    found |= {m.column: gradients.get(m.key) for m in OF_GRADIENTS}
    return {column: value for column, value in found.items() if value is not None}


def _mean_by_key(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for one in found for key in one)
    return {key: statistics.fmean(one[key] for one in found if key in one) for key in keys}
