"""One training of a sweep, in its own process, and what is measured of it on its way."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from poweropd.config import Config
from poweropd.errors import DivergedError
from poweropd.evaluation.benchmarks import Problem, ProblemSet, load_benchmark
from poweropd.evaluation.metrics import problem_values
from poweropd.evaluation.runner import Subject, run_benchmarks
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.runs.files import recover_jsonl
from poweropd.sweep.forgetting import divergence_from_start
from poweropd.sweep.jobs import Measurement, Training, solving
from poweropd.training.gradient_noise import measure_gradient
from poweropd.training.trainer import Result, Trainer


def train_and_measure(
    config_path: Path, measurements: Sequence[Measurement], trial: bool = False
) -> Result:
    """Trains on from where the run directory is, and measures what was not measured yet.

    A signal during a step ends it with a checkpoint. One during a measurement ends the process;
    the steps before it are in a checkpoint already, and the measurement is made again. A `trial`
    may diverge, and ends with its figures.
    """
    trainer = Trainer(Config.load(config_path))
    training = Training("", trainer.config, measurements, trial)
    recover_jsonl(training.points_path)
    why = ""
    try:
        result = _train(trainer, training)
    except DivergedError as error:
        if not trial:
            raise
        result, why = Result(trainer.run.path, trainer.steps_done, None), str(error)
    if trial and result.interrupted_by is None:
        training.directory.end_trial(why)
    return result


def _train(trainer: Trainer, training: Training) -> Result:
    """Does the remaining steps and measurements, up to a signal."""
    for wanted in training.measurements:
        result = trainer.train(until=wanted.step)
        if result.interrupted_by is not None:
            return result
        if trainer.steps_done == wanted.step and wanted not in training.points():
            training.record(wanted, measure(trainer, training, wanted))
    return trainer.train()


def measure(trainer: Trainer, training: Training, wanted: Measurement) -> dict[str, float]:
    """Returns what is measured: of problems, of forgetting, of gradients; and the seconds."""
    started, figures = time.perf_counter(), dict[str, float]()
    if wanted.problems:
        problems = load_benchmark("embedded", limit=wanted.problems)
        path, settings = training.completions_path(wanted), solving(trainer.config)
        figures |= solve(trainer.subject(), problems, settings, path)
    if wanted.other:
        figures |= divergence_from_start(trainer, wanted.other, training.forgetting_folder(wanted))
    if wanted.batches:
        figures |= measure_gradient(trainer, wanted.batches, wanted.cosine)
    return figures | {"seconds": round(time.perf_counter() - started, 1)}


def solve(
    subject: Subject, problems: Sequence[Problem], settings: EvaluationSettings, path: Path
) -> dict[str, float]:
    """Returns accuracy and mean length on problems; `path` is the file of the completions."""
    asked = {path.stem: ProblemSet(problems, settings)}
    done = run_benchmarks(subject, asked, path.parent, progress=False)
    rows = done[path.stem].rows
    accuracy = fmean(problem_values(rows).values())
    return {"accuracy": accuracy, "mean_length": fmean(row["tokens"] for row in rows)}
