"""What the runs of a sweep say, cell by cell: figures of benchmarks, and of the training itself."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poweropd.evaluation.metrics import Estimate, avg_values, estimate_over_seeds, pass_values
from poweropd.runs.directory import RunDirectory
from poweropd.sweep import paper
from poweropd.sweep.jobs import Training

MEAN = "mean"  # over the benchmarks
LAST_PART = 10  # the training's end: its last tenth of steps

#: Column -> (metric, whether it is of the training's last tenth, else the median of all steps).
OF_TRAINING = {
    "reverse_kl": ("reverse_kl", True),
    "length": ("completions/mean_length", True),
    "truncated": ("completions/truncated_fraction", True),
    "grad_norm": ("grad_norm", False),
}


@dataclass(frozen=True)
class BenchmarkFigures:
    """A cell's figures on one benchmark, or the means over all; fractions and tokens."""

    k: int
    avg_at_k: Estimate
    pass_at_k: Estimate
    mean_length: float
    seeds: list[float]  # Avg@k of each


@dataclass(frozen=True)
class Row:
    """One cell, over those of its seeds that are finished."""

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
    """A row for each cell; figures of each run's last step or, if `best`, of its best one."""
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


def evaluation(training: Training, best: bool) -> dict[str, Any]:
    """A run's results, benchmark -> figures, as its evaluation wrote them; {} without one."""
    run: RunDirectory = training.directory
    step = training.steps
    if best and (run.path / "best.json").exists():
        step = json.loads((run.path / "best.json").read_text())["step"]
    path = run.evaluations / f"step-{step}" / "results.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, BenchmarkFigures]:
    """benchmark -> its figures over seeds and, of several benchmarks, "mean" -> theirs."""
    if not found:
        return {}
    names = list(found[0])
    averages, passes = {}, {}
    for name in names:
        correct = [_correct(one[name]) for one in found]
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


def _correct(result: Mapping[str, Any]) -> NDArray[np.bool_]:
    """[problems, n] grades, in the order of the problems' ids, from each one's correct fraction.

    Which of the n were correct is not kept, and no figure at k = n depends on it.
    """
    n = result["n"]
    counts = np.rint(np.array([result["solved"][id] for id in sorted(result["solved"])]) * n)
    return np.arange(n) < counts[:, None]


def of_training(training: Training) -> dict[str, float]:
    """What a finished run's metrics and gradients say, column -> number."""
    metrics = training.directory.metrics()
    last = metrics[-max(1, len(metrics) // LAST_PART) :]
    found = {}
    for column, (key, at_end) in OF_TRAINING.items():
        values = [m[key] for m in (last if at_end else metrics) if m.get(key) is not None]
        if values:
            found[column] = statistics.fmean(values) if at_end else statistics.median(values)
    found["seconds"] = sum(m["seconds/step"] for m in metrics)
    for when, measured in training.gradients().items():
        found |= {f"{key.removeprefix('gradient_')}_{when}": v for key, v in measured.items()}
    return found


def _mean_by_key(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for one in found for key in one)
    return {key: statistics.fmean(one[key] for one in found if key in one) for key in keys}
