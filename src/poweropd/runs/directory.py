"""The run directory: the only reader and writer of its files, and how they survive a kill.

Whole files (config, environment, results) are written under another name and renamed.
`metrics.jsonl` grows by one line per optimizer step; resuming cuts it back to the checkpoint.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from poweropd.config import Config
from poweropd.config.recipe_file import read_yaml
from poweropd.errors import UNREADABLE, RunError, UsageError
from poweropd.runs.environment import describe_environment
from poweropd.runs.files import (
    JsonObject,
    locked,
    read_json,
    read_jsonl,
    write_atomically,
    write_json,
)
from poweropd.runs.metrics import StepMetrics

_EVALUATED = re.compile(r"step-(\d+)")
#: Name, size and time of change of the files of a run.
RunState = frozenset[tuple[str, int, int]]
LOCK = ".lock"
LOG = "train.log"
#: The folder of the teacher's own evaluation, in that of all evaluations.
TEACHER = "teacher"
_TRIAL = "trial.json"
LARGEST_NUMBER = 1e300
_TAIL_BYTES = 1 << 16  # of metrics.jsonl: several rows


class BestStep(NamedTuple):
    """The content of best.json: the evaluated step with the best value of a metric."""

    metric: str
    value: float
    step: int


class RunDirectory:
    """The paths and files of one run; `open` claims the directory for one configuration.

    A damaged file raises RunError or, if `notes` is given, is left out and named in that list.
    """

    def __init__(self, path: str | Path, notes: list[str] | None = None) -> None:
        self.path, self.notes = Path(path), notes
        self.config_path, self.log_path = self.path / "config.yaml", self.path / LOG
        self.metrics_path = self.path / "metrics.jsonl"
        self.environment_path = self.path / "environment.json"
        self.checkpoints = self.path / "checkpoints"
        self.final, self.best_student = self.path / "final", self.path / "best"
        self.evaluations_path = self.path / "eval"
        self.rewards = self.path / "rewards"

    @classmethod
    def open(cls, config: Config) -> "RunDirectory":
        """Creates the directory, or reuses one that holds the same configuration.

        A directory without any finished step may be claimed by another configuration. Raises
        UsageError if it holds steps of another configuration, or something that is not a run.
        """
        run = cls(config.run.dir)
        if run.config_path.exists():
            differences = config.differences(run.config())
            if differences and run.metrics():
                raise UsageError(
                    f"run.dir: {run.path} holds another configuration ({'; '.join(differences)}); "
                    "choose another run.dir, or delete that directory"
                )
            if not differences:
                if run.config_path.read_text() != config.to_yaml():  # how, not what, is computed
                    write_atomically(run.config_path, config.to_yaml())
                # A kill came before it, or it was damaged since.
                if "packages" not in cls(config.run.dir, notes=[]).environment():
                    write_json(run.environment_path, describe_environment())
                return run
        elif run.path.exists() and not run._is_empty():
            raise UsageError(f"run.dir: {run.path} exists and is not a run directory")
        run.path.mkdir(parents=True, exist_ok=True)
        for file in run.path.glob("quantization*.json"):  # measured with another configuration
            file.unlink()
        write_atomically(run.config_path, config.to_yaml())
        write_json(run.environment_path, describe_environment())
        return run

    def locked(self) -> AbstractContextManager[IO[str]]:
        """Keeps other processes from training in the directory; raises UsageError if one does."""
        message = f"run.dir: {self.path} is in use by another process: wait for it, or stop it"
        return locked(self.path / LOCK, message)

    @property
    def is_complete(self) -> bool:
        """Tells whether `final/` holds a student, or a trial has ended, which keeps none.

        A directory that was emptied by somebody holds no student.
        """
        if self.trial_end():
            return True
        weights = [*self.final.glob("*.safetensors"), *self.final.glob("*.bin")]
        configs = [self.final / "config.json", self.final / "adapter_config.json"]
        return bool(weights) and any(path.is_file() for path in configs)

    def check_inputs(self, fingerprints: Mapping[str, str]) -> None:
        """Raises UsageError if an input of the run is not what its first steps were trained from.

        `fingerprints`: the name of each input -> what it is now.
        """
        path = self.path / "inputs.json"
        found = self._read(path.name) if self.metrics() else {}
        changed = [name for name, now in fingerprints.items() if found.get(name, now) != now]
        if changed:
            raise UsageError(
                f"run.dir: {self.path}: {' and '.join(changed)} changed since the run began: "
                "restore it, choose another run.dir, or, to go on with it on purpose, delete "
                f"{path}"
            )
        write_json(path, found | dict(fingerprints))

    def _is_empty(self) -> bool:
        """Tells whether nothing is there but a log and what a kill left of the first file."""
        found = self.path.iterdir() if self.path.is_dir() else [self.path]
        return all(path.name in (LOCK, LOG, f".{self.config_path.name}.tmp") for path in found)

    def config(self) -> Config:
        """Returns the configuration of the run, checked; nothing that it names is imported."""
        return Config.read(self.config_path)

    def recipe(self) -> JsonObject:
        """Returns the tree of config.yaml, unchecked."""
        return read_yaml(self.config_path)

    def environment(self) -> JsonObject:
        """Returns versions and hardware, as `open` found them."""
        return self._read("environment.json")

    def _read(self, name: str) -> JsonObject:
        return read_json(self.path / name, self.notes)

    def state(self) -> RunState:
        """Returns name, size and time of change of every file that a report reads."""
        folders = (self.rewards.rglob("*"), self.evaluations_path.glob("*/results.json"))
        files = [self.config_path, *self.path.glob("*.json*"), *self.final.glob("*")]
        files += [file for folder in folders for file in folder]
        found = set()
        for file in files:
            with suppress(FileNotFoundError):  # parts are merged and removed while a run goes on
                stat = file.stat()
                found.add((str(file), stat.st_size, stat.st_mtime_ns))
        return frozenset(found)

    # What training says.

    def append_log(self, text: str) -> None:
        """Adds lines to the log, without characters that a terminal might obey."""
        lines = ["".join(c if c.isprintable() else " " for c in one) for one in text.splitlines()]
        with self.log_path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(f"{line}\n" for line in lines))

    # Metrics.

    def append_metrics(self, row: StepMetrics) -> None:
        """Adds the row of one optimizer step."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[StepMetrics]:
        """Returns the rows of the finished steps; a last line cut short by a kill is left out."""
        rows = read_jsonl(self.metrics_path, self.notes)
        if self.notes is not None:
            rows = self._numbers(rows, self.notes)
        by_step = {row["step"]: row for row in rows if "step" in row}
        return [by_step[step] for step in sorted(by_step)]

    def _numbers(self, rows: Sequence[JsonObject], notes: list[str]) -> list[StepMetrics]:
        """Returns the rows without values that are not numbers, which are counted in a note."""
        kept = [{key: value for key, value in row.items() if is_number(value)} for row in rows]
        steps = [row for row in kept if isinstance(row.get("step"), int) and row["step"] > 0]
        nulls = sum(value is None for row in rows for value in row.values())
        odd = sum(map(len, rows)) - sum(map(len, kept)) - nulls
        if odd or len(steps) < len(rows):
            notes.append(
                f"metrics.jsonl: {odd} values that are not numbers and {len(rows) - len(steps)} "
                "lines without a step, left out"
            )
        return steps

    def truncate_metrics(self, steps: int) -> None:
        """Keeps the rows of the first `steps` optimizer steps."""
        if self.metrics_path.exists():
            kept = [row for row in self.metrics() if row["step"] <= steps]
            write_atomically(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))

    def steps_done(self) -> int:
        """Returns the step of the last complete row, from the end of a file that may be large."""
        if not self.metrics_path.exists():
            return 0
        with self.metrics_path.open("rb") as file:
            file.seek(max(0, self.metrics_path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        try:
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (KeyError, TypeError, *UNREADABLE) as error:
            raise RunError(f"{self.metrics_path}: its last line is damaged ({error!r})") from None

    # Evaluations.

    def evaluation_folder(self, step: int) -> Path:
        """Returns the directory of the completions and results of an evaluation."""
        return self.evaluations_path / f"step-{step}"

    def evaluation(self, step: int) -> dict[str, JsonObject]:
        """Returns benchmark -> results of the evaluation at this step; {} if there was none."""
        return self._benchmarks(self.evaluation_folder(step))

    def teacher_evaluation(self) -> dict[str, JsonObject]:
        """Returns benchmark -> results of the teacher itself; {} if it was not evaluated."""
        return self._benchmarks(self.evaluations_path / TEACHER)

    def write_teacher_evaluation(self, results: Mapping[str, JsonObject]) -> None:
        """Writes benchmark -> results of the teacher itself."""
        folder = self.evaluations_path / TEACHER
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", {"results": results})

    def _benchmarks(self, folder: Path) -> dict[str, JsonObject]:
        """Returns benchmark -> results of the evaluation in a folder."""
        path = folder / "results.json"
        results = read_json(path, self.notes).get("results", {})
        if self.notes is None:
            return dict(results)
        pairs = results.items() if isinstance(results, dict) else []
        whole = {name: result for name, result in pairs if _has_estimates(result)}
        if whole != results:
            self.notes.append(f"{path.parent.name}/{path.name}: results without figures, left out")
        return whole

    def evaluations(self) -> dict[int, dict[str, JsonObject]]:
        """Returns step -> benchmark -> results, in the order of steps."""
        return {step: self.evaluation(step) for step in self._evaluated_steps()}

    def divergence(self, step: int) -> JsonObject:
        """Returns how far the student was from its teacher at this step; {} if not measured.

        That is figure -> mean, low and high; `divergence_facts` tells the rest.
        """
        found = self._results(self.evaluation_folder(step)).get("divergence", {})
        figures = found.items() if isinstance(found, dict) else []
        return {name: figure for name, figure in figures if _is_estimate(figure)}

    def divergences(self) -> dict[int, JsonObject]:
        """Returns step -> figures of `divergence`, in the order of steps."""
        found = {step: self.divergence(step) for step in self._evaluated_steps()}
        return {step: figures for step, figures in found.items() if figures}

    def divergence_facts(self, step: int) -> JsonObject:
        """Returns what else is known of it: estimate, prompts, n, tokens, per_prompt."""
        found = self._results(self.evaluation_folder(step))
        return {key: value for key, value in found.items() if key not in ("results", "divergence")}

    def _results(self, folder: Path) -> JsonObject:
        return read_json(folder / "results.json", self.notes)

    def _evaluated_steps(self) -> list[int]:
        found = [_EVALUATED.fullmatch(path.name) for path in self.evaluations_path.glob("step-*")]
        return sorted(int(match[1]) for match in found if match)

    def write_evaluation(
        self,
        step: int,
        results: Mapping[str, JsonObject],
        divergence: Mapping[str, object] | None = None,
    ) -> None:
        """Writes benchmark -> results of the evaluation at this step, 0 for before the first.

        `divergence` is what `Divergence.to_dict` of the evaluation returns.
        """
        folder = self.evaluation_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", {"results": results, **(divergence or {})})

    def best(self) -> BestStep | None:
        """Returns the best step so far, or None before the first evaluation."""
        found = self._read("best.json")
        if not found:
            return None
        if not isinstance(found.get("step"), int) or not isinstance(found.get("value"), float):
            raise RunError(f"{self.path / 'best.json'}: expected metric, value and step: delete it")
        return BestStep(str(found.get("metric")), found["value"], found["step"])

    def write_best(self, metric: str, value: float, step: int) -> None:
        """Writes which step is the best so far, by which metric."""
        write_json(self.path / "best.json", BestStep(metric, value, step)._asdict())

    # What is measured beside training.

    def gradients(self) -> dict[str, dict[str, float]]:
        """Returns the gradients' quality at the "start" and the "end"; {} if never measured."""
        return self._read("gradients.json")

    def gradient_figures(self) -> dict[str, float]:
        """Returns the figures of `gradients` under dotted keys such as "start.gradient_snr"."""
        pairs = self.gradients().items()
        return {f"{when}.{key}": value for when, found in pairs for key, value in found.items()}

    def write_gradients(self, when: str, quality: Mapping[str, float]) -> None:
        """Writes the gradients' quality at the "start" or the "end", beside the other one."""
        write_json(self.path / "gradients.json", self.gradients() | {when: dict(quality)})

    def end_trial(self, diverged: str = "") -> None:
        """Writes that a trial has ended, and why if it diverged, and removes all its weights."""
        write_json(self.path / _TRIAL, {"diverged": diverged})
        for folder in (self.checkpoints, self.best_student, self.final):
            shutil.rmtree(folder, ignore_errors=True)

    def trial_end(self) -> JsonObject:
        """Returns {"diverged": why or ""} of a trial that has ended, else {}."""
        return self._read(_TRIAL)

    def quantization(self, domain: str = "") -> dict[str, float]:
        """Returns what quantizing a domain's teacher does to rewards; {} if it was not measured."""
        return self._read(_quantization_name(domain))

    def write_quantization(self, effect: Mapping[str, float], domain: str = "") -> None:
        """Writes what quantizing a domain's teacher does to rewards."""
        write_json(self.path / _quantization_name(domain), effect)


def is_number(value: object) -> bool:
    """Tells whether a value of a JSON file is a number that a figure can show."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < LARGEST_NUMBER  # not NaN, not infinite, not an integer of 400 digits


def _has_estimates(result: object) -> bool:
    """Tells whether an evaluation's result has the figures that a report shows."""
    return isinstance(result, dict) and _is_estimate(result.get("avg_at_k"))


def _is_estimate(figure: object) -> bool:
    """Tells whether a figure of an evaluation has a mean and both ends of its interval."""
    parts = ("mean", "low", "high")
    return isinstance(figure, dict) and all(is_number(figure.get(part)) for part in parts)


def _quantization_name(domain: str) -> str:
    return f"quantization{'-' if domain else ''}{domain.replace('/', '-')}.json"


def run_directories(paths: Sequence[Path]) -> list[Path]:
    """Returns the run directories among these paths and, of other folders, those in them.

    Raises UsageError for a path that is neither.
    """
    found = []
    for path in paths:
        if RunDirectory(path).config_path.is_file():
            found.append(path)
            continue
        inside = [file.parent for file in path.glob("*/config.yaml")]
        if not inside:
            problem = "has no config.yaml" if path.exists() else "does not exist"
            raise UsageError(
                "RUN: expected run directories of poweropd train, or a folder of them such as a "
                f"sweep's; {path} {problem}"
            )
        found += sorted(inside, key=_by_numbers)
    return found


def _by_numbers(path: Path) -> list[tuple[float, str]]:
    """Returns a key by which "alpha=50" comes after "alpha=5.0"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", path.name)
    return [(float(part), "") if i % 2 else (0.0, part) for i, part in enumerate(parts)]
