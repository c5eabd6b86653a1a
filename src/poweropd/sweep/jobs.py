"""The jobs of a sweep, a process each: trainings with what is measured of them, and evaluations."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from poweropd.config import Config
from poweropd.errors import RunError
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import read_json, read_jsonl

STEPS_OF_A_BATCH = 4  # optimizer steps that take about as long as one batch of a measurement
OPTIONS = ("n", "max_new_tokens", "temperature", "top_p", "top_k", "seed")  # of poweropd eval


@dataclass(frozen=True)
class Measurement:
    """What is measured of a training as soon as it has done `step` optimizer steps."""

    step: int
    batches: int = 0  # of fresh rollouts, for the gradient's signal-to-noise ratio
    cosine: bool = False  # whether their gradients are also compared with the exact one
    problems: int = 0  # of the embedded task, for the student to solve
    other: str = ""  # prompts, on which the divergence from the start is measured


def at_both_ends(snr: int) -> Callable[[int], list[Measurement]]:
    """Returns a function of the steps of a training: its measurements of `snr` batches, if any."""
    return lambda steps: [Measurement(step, snr, cosine=True) for step in (0, steps) if snr]


class Training:
    """One run of a sweep; its measurements are in the order of their steps.

    A trial is run for its figures: that it diverged is a result, and its weights are not kept.
    """

    def __init__(
        self,
        cell: str,
        config: Config,
        measurements: Sequence[Measurement] = (),
        trial: bool = False,
    ) -> None:
        self.cell, self.seed, self.config, self.trial = cell, config.train.seed, config, trial
        self.measurements, self.steps = measurements, config.train.steps
        self.directory = RunDirectory(config.run.dir)
        self.path, self.name = self.directory.path, self.directory.path.name
        self.points_path = self.path / "points.jsonl"
        self.work = self.steps + STEPS_OF_A_BATCH * sum(one.batches for one in measurements)
        wanted = [f"--measure={json.dumps(asdict(one))}" for one in measurements]
        self.options = [*wanted, *(["--trial"] if trial else [])]
        self.arguments = ["sweep-run", str(self.directory.config_path), *self.options]

    def progress(self) -> tuple[int, str]:
        """Returns how much of `work` is done, and the steps and the last accuracy as text."""
        steps, points = self.directory.steps_done(), self.points()
        text = f"{steps} of {self.steps} steps"
        for figures in [one for one in points.values() if "accuracy" in one][-1:]:
            text += f", accuracy {figures['accuracy']:.3f}"
        return steps + STEPS_OF_A_BATCH * sum(one.batches for one in points), text

    def is_finished(self) -> bool:
        """Returns whether the training is complete and was measured at its end."""
        if self.diverged():
            return True
        last = self.measurements[-1:]
        return self.directory.is_complete and all(one in self.points() for one in last)

    def diverged(self) -> str:
        """Returns why a trial ended before its last step; "" if it did not."""
        return str(self.directory.trial_end().get("diverged", ""))

    def points(self) -> dict[Measurement, dict[str, float]]:
        """Returns what was measured so far: each measurement's figures by their names."""
        rows = read_jsonl(self.points_path)
        try:
            return {Measurement(**row["measurement"]): dict(row["figures"]) for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.points_path}: damaged ({error!r}); delete it") from None

    def record(self, measurement: Measurement, figures: Mapping[str, float]) -> None:
        """Appends a measurement; reports find the gradients of both ends in a file of their own."""
        when = {0: "start", self.steps: "end"}.get(measurement.step)
        quality = {key: value for key, value in figures.items() if key.startswith("gradient_")}
        if when and quality:
            self.directory.write_gradients(when, quality)
        with self.points_path.open("a", encoding="utf-8") as file:
            row = {"measurement": asdict(measurement), "figures": dict(figures)}
            file.write(json.dumps(row) + "\n")

    def forgetting_folder(self, measurement: Measurement) -> Path:
        """Returns the folder of the divergence from the start."""
        return self.directory.evaluation_folder(measurement.step) / "from-start"

    def completions_path(self, measurement: Measurement) -> Path:
        """Returns the file with the completions of a measurement's problems."""
        folder = self.directory.evaluation_folder(measurement.step)
        return folder / f"{measurement.problems}-problems.jsonl"


class Series:
    """Trainings that one process does one after the other, all with the same measurements.

    For small models, whose training may take less time than a process takes to begin. If one of
    them fails, those behind it are not done.
    """

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.trainings, first = trainings, trainings[0]
        self.name = first.name + (f" and {len(trainings) - 1} more" if len(trainings) > 1 else "")
        self.path, self.work = first.path, sum(one.work for one in trainings)
        configs = [str(one.directory.config_path) for one in trainings]
        self.arguments = ["sweep-run", *configs, *first.options]

    def progress(self) -> tuple[int, str]:
        """Returns how much of `work` is done, and how many trainings are finished as text."""
        finished = sum(one.is_finished() for one in self.trainings)
        done = sum(one.progress()[0] for one in self.trainings)
        return done, f"{finished} of {len(self.trainings)} trainings"

    def is_finished(self) -> bool:
        """Returns whether all trainings are finished."""
        return all(one.is_finished() for one in self.trainings)


class ShippedModel:
    """The evaluation of an embedded model as it is shipped, by `poweropd eval`."""

    work = 0  # next to nothing beside a training's

    def __init__(self, name: str, path: Path, problems: int, settings: EvaluationSettings) -> None:
        self.name, self.path, self.problems = name, path, problems
        self.results_path = path / "results.json"
        values = asdict(settings)
        self.arguments = [
            *("eval", f"embedded:{name}", "--dtype=float32"),
            *("--benchmark=embedded", f"--limit={problems}"),
            *(f"--{key.replace('_', '-')}={values[key]}" for key in OPTIONS),
            *(f"--out={path}", f"--json={self.results_path}"),
        ]

    def progress(self) -> tuple[int, str]:
        """Returns how much of `work` is done, and the number of problems as text."""
        accuracy = f", accuracy {self.figures()['accuracy']:.3f}" if self.is_finished() else ""
        return 0, f"{self.problems} problems{accuracy}"

    def is_finished(self) -> bool:
        """Returns whether there are figures."""
        return self.results_path.exists()

    def figures(self) -> dict[str, float]:
        """Returns the accuracy, and the mean length of completions in tokens."""
        found = read_json(self.results_path)["results"]["embedded"]
        accuracy, length = found["avg_at_k"]["mean"], found["mean_length"]["mean"]
        return {"accuracy": accuracy, "mean_length": length}


Job = Training | Series | ShippedModel


def solving(config: Config) -> EvaluationSettings:
    """Returns how measurements sample: one completion a problem, from the whole vocabulary."""
    length = config.rollout.longest
    return EvaluationSettings(n=1, max_new_tokens=length, top_p=1.0, top_k=0)
