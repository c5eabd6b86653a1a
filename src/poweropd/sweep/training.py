"""The jobs of a sweep: its trainings, what is measured of them, and how far they are."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from poweropd.config import Config
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.runs.directory import RunDirectory, read_jsonl, write_atomically

TAIL_BYTES = 1 << 16  # of metrics.jsonl: several rows
STEPS_OF_A_BATCH = 4  # optimizer steps that take about as long as one batch of a measurement


class Job(Protocol):
    """What a sweep runs in a process of its own."""

    @property
    def name(self) -> str:
        """Returns the name that progress and failures are reported under."""

    @property
    def path(self) -> Path:
        """Returns the directory that holds the log and all other files of the job."""

    @property
    def arguments(self) -> list[str]:
        """Returns the command line, without `poweropd`."""

    @property
    def work(self) -> int:
        """Returns the length of the whole job, in optimizer steps or what takes as long."""

    def work_done(self) -> int:
        """Returns how much of `work` is done."""

    def state(self) -> str:
        """Returns how far the job is, for people."""

    def is_finished(self) -> bool:
        """Returns whether nothing is left to be done."""


@dataclass(frozen=True)
class Measurement:
    """What is measured of a training as soon as it has done `step` optimizer steps."""

    step: int
    batches: int = 0  # of fresh rollouts, for the gradient's signal-to-noise ratio
    cosine: bool = False  # whether their gradients are also compared with the exact one
    problems: int = 0  # of the embedded task, for the student to solve

    @property
    def work(self) -> int:
        """Returns the number of optimizer steps that take about as long."""
        return STEPS_OF_A_BATCH * self.batches

    @property
    def benchmark(self) -> str:
        """Returns the name under which the completions are kept, in the step's evaluations."""
        return f"{self.problems}-problems"


@dataclass(frozen=True)
class Training:
    """One run of a sweep."""

    cell: str  # its label
    seed: int
    config: Config
    measurements: tuple[Measurement, ...] = ()  # in the order of their steps

    @property
    def directory(self) -> RunDirectory:
        """Returns the run directory."""
        return RunDirectory(self.config.run.dir)

    @property
    def path(self) -> Path:
        """Returns the path of the run directory."""
        return self.directory.path

    @property
    def name(self) -> str:
        """Returns the name of the run directory."""
        return self.path.name

    @property
    def steps(self) -> int:
        """Returns the number of optimizer steps of the whole training."""
        return self.config.train.steps

    @property
    def arguments(self) -> list[str]:
        """Returns the command line of the process that trains and measures."""
        wanted = [f"--measure={json.dumps(asdict(one))}" for one in self.measurements]
        return ["sweep-run", str(self.directory.config_path), *wanted]

    @property
    def work(self) -> int:
        """Returns the optimizer steps, with measurements as the steps that take as long."""
        return self.steps + sum(one.work for one in self.measurements)

    def work_done(self) -> int:
        """Returns how much of `work` is done."""
        return steps_done(self.directory) + sum(one.work for one in self.points())

    def state(self) -> str:
        """Returns the steps done and the last accuracy, if one was measured."""
        text = f"{steps_done(self.directory)} of {self.steps} steps"
        accuracies = [one["accuracy"] for one in self.points().values() if "accuracy" in one]
        return f"{text}, accuracy {accuracies[-1]:.3f}" if accuracies else text

    def is_finished(self) -> bool:
        """Returns whether the training is complete and measured at its end."""
        last = self.measurements[-1:]
        return self.directory.final.exists() and all(one in self.points() for one in last)

    @property
    def points_path(self) -> Path:
        """Returns the file with a line for each measurement."""
        return self.path / "points.jsonl"

    def points(self) -> dict[Measurement, dict[str, float]]:
        """Returns what the measurements found so far, by the names of the figures."""
        rows = read_jsonl(self.points_path)
        return {Measurement(**row["measurement"]): row["figures"] for row in rows}

    def record(self, measurement: Measurement, figures: Mapping[str, float]) -> None:
        """Appends a measurement; one of gradients at the start or end is kept for reports, too."""
        when = {0: "start", self.steps: "end"}.get(measurement.step)
        quality = {key: value for key, value in figures.items() if key.startswith("gradient_")}
        if when and quality:
            found = self.gradients() | {when: quality}
            write_atomically(self.gradients_path, json.dumps(found, indent=2) + "\n")
        with self.points_path.open("a", encoding="utf-8") as file:
            row = {"measurement": asdict(measurement), "figures": dict(figures)}
            file.write(json.dumps(row) + "\n")

    @property
    def gradients_path(self) -> Path:
        """Returns the file with the quality of the gradients at the start and the end."""
        return self.path / "gradients.json"

    def gradients(self) -> dict[str, dict[str, float]]:
        """Returns the figures of the gradients at the "start" and the "end", if measured."""
        return json.loads(self.gradients_path.read_text()) if self.gradients_path.exists() else {}

    def completions_path(self, measurement: Measurement) -> Path:
        """Returns the file with the completions of a measurement's problems."""
        folder = self.directory.evaluations / f"step-{measurement.step}"
        return folder / f"{measurement.benchmark}.jsonl"


def solving(config: Config) -> EvaluationSettings:
    """Returns how measurements sample: one completion a problem, from the whole vocabulary."""
    return EvaluationSettings(n=1, max_new_tokens=config.rollout.max_new_tokens, top_p=1.0, top_k=0)


def steps_done(run: RunDirectory) -> int:
    """Returns the last complete row's step, from the end of a file that may be large and grow."""
    if not run.metrics_path.exists():
        return 0
    with run.metrics_path.open("rb") as file:
        file.seek(max(0, run.metrics_path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0
