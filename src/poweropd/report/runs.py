"""The runs of a report: finished, going on or broken off.

Nothing here fails on a run that ended badly; what had to be left out becomes a note on the page.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from poweropd.config.recipe_file import flatten
from poweropd.errors import UsageError
from poweropd.evaluation.divergence import SAMPLED
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import JsonObject
from poweropd.runs.recorder import RewardRecords


class RecordedRun:
    """What a run directory holds, with the run's name on the page and notes on what is missing."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.notes = name, list[str]()
        directory = RunDirectory(path, self.notes)
        self.recipe = directory.recipe()
        self.metrics = directory.metrics()
        self.environment = directory.environment()
        self.evaluations = directory.evaluations()
        self.teacher = directory.teacher_evaluation()  # benchmark -> the teacher's own results
        self.divergences = directory.divergences()  # step -> figure -> mean, low, high
        self.divergence_facts = {
            step: directory.divergence_facts(step) for step in self.divergences
        }
        self.gradients = directory.gradient_figures()
        self.complete = directory.is_complete
        self.rewards = RewardRecords.read(directory.rewards)
        if self.rewards.unreadable:
            parts = ", ".join(self.rewards.unreadable)
            self.notes.append(f"reward records left out, unreadable: {parts}")
        elif not len(self.rewards.positions):
            self.notes.append(
                "no reward records: figures of rewards by position are without this run"
            )
        # A damaged file may have been read, and noted, for several things.
        self.notes = list(dict.fromkeys(self.notes))
        if not self.complete:
            self.notes.append(f"{self.status}; it is still going, or was stopped or broken off")

    @property
    def config(self) -> JsonObject:
        """Returns every setting under its dotted key."""
        return flatten(self.recipe)

    @property
    def reward_setting(self) -> JsonObject:
        """Returns the reward as the recipe has it; {} if config.yaml holds no such thing."""
        found = self.recipe.get("reward", {})
        return found if isinstance(found, dict) else {}

    @property
    def steps(self) -> int:
        """Returns the number of optimizer steps that are done."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def status(self) -> str:
        """Says whether the run is complete and, if not, how far it is."""
        if self.complete:
            return "complete"
        if not self.steps:
            return "no step finished"
        return f"not complete: step {self.steps} of {self.config.get('train.steps', 'unknown')}"

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Returns steps and values of a metric, where the run has one."""
        found = [(row["step"], row[key]) for row in self.metrics if row.get(key) is not None]
        return [step for step, _ in found], [float(value) for _, value in found]

    @property
    def has_sampled_divergence(self) -> bool:
        """Returns whether the last reverse KL on held-out prompts is an estimate from tokens."""
        facts = list(self.divergence_facts.values())
        return bool(facts) and facts[-1].get("estimate") == SAMPLED

    def results(self, benchmark: str) -> list[tuple[int, JsonObject]]:
        """Returns steps and results of a benchmark, in the order of steps."""
        found = self.evaluations.items()
        return [(step, results[benchmark]) for step, results in found if benchmark in results]


def benchmarks(runs: Sequence[RecordedRun]) -> list[str]:
    """Returns the names of the benchmarks that any of the runs was evaluated on."""
    evaluations = [results for run in runs for results in run.evaluations.values()]
    return list(dict.fromkeys(name for results in evaluations for name in sorted(results)))


def read_runs(
    paths: Sequence[Path], known: Mapping[Path, RecordedRun] | None = None
) -> list[RecordedRun]:
    """Returns the runs of these directories; those that are `known` are not read again.

    Raises UsageError for a path that is given twice.
    """
    found = []
    for name, path in zip(_page_names(paths), paths, strict=True):
        run = (known or {}).get(path) or RecordedRun(name, path)
        run.name = name
        found.append(run)
    return found


def _page_names(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that tell them apart."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for path, end in zip(paths, whole, strict=True) if whole.count(end) > 1)
        raise UsageError(f"RUN: {twice} is given twice")
    for depth in range(1, max(len(path.parts) for path in whole)):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in whole]
