"""One training of a sweep, in its own process, and what is measured of it on its way."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from poweropd.config import Config
from poweropd.evaluation.benchmarks import load_benchmark
from poweropd.evaluation.metrics import problem_values
from poweropd.evaluation.runner import evaluate
from poweropd.runs.directory import recover_jsonl
from poweropd.sweep.training import Measurement, Training, solving
from poweropd.training import gradient_noise
from poweropd.training.trainer import Result, Trainer


def train_and_measure(config_path: Path, measurements: Sequence[Measurement]) -> Result:
    """Trains on from where the run directory is, and measures what was not measured yet.

    A signal during a step ends it with a checkpoint. One during a measurement ends the process;
    the steps before it are in a checkpoint already, and the measurement is made again.
    """
    trainer = Trainer(Config.load(config_path))
    training = Training("", trainer.config.train.seed, trainer.config, tuple(measurements))
    recover_jsonl(training.points_path)
    for measurement in measurements:
        result = trainer.train(until=measurement.step)
        if result.interrupted_by is not None:
            return result
        if trainer.steps_done == measurement.step and measurement not in training.points():
            started = time.perf_counter()
            figures = measure(trainer, training, measurement)
            seconds = round(time.perf_counter() - started, 1)
            training.record(measurement, {**figures, "seconds": seconds})
    return trainer.train()


def measure(trainer: Trainer, training: Training, wanted: Measurement) -> dict[str, float]:
    """Returns the accuracy and mean length on the problems, and the quality of the gradient."""
    figures: dict[str, float] = {}
    if wanted.problems:
        problems = {wanted.benchmark: load_benchmark("embedded", limit=wanted.problems)}
        folder = training.completions_path(wanted).parent
        settings = solving(trainer.config)
        done = evaluate(trainer.subject(), problems, settings, folder, progress=False)
        rows = done[wanted.benchmark].rows
        figures["accuracy"] = fmean(problem_values(rows).values())
        figures["mean_length"] = fmean(row["tokens"] for row in rows)
    if wanted.batches:
        figures |= gradient_noise.measure_gradient(trainer, wanted.batches, wanted.cosine)
    return figures
