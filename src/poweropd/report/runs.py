"""What a report knows of a run: everything its directory holds, finished, going on or broken off.

Nothing here fails on a run that ended badly; what had to be left out becomes a note on the page.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poweropd.config.recipe_file import flatten, read_yaml
from poweropd.errors import UsageError
from poweropd.runs.directory import RunDirectory
from poweropd.runs.recorder import RewardRecords

EVALUATED = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class BenchmarkAtStep:
    """One benchmark at one step: `result` as `eval/step-N/results.json` has it."""

    step: int
    benchmark: str
    result: dict[str, Any]


@dataclass
class RecordedRun:
    """One run directory, read."""

    name: str  # unique on the page
    path: Path
    recipe: dict[str, Any]  # config.yaml
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]  # one a step
    rewards: RewardRecords
    evaluations: list[BenchmarkAtStep]  # by step
    gradients: dict[str, Any]  # gradients.json: their quality at the start and the end
    complete: bool
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """Every setting under its dotted key."""
        return flatten(self.recipe)

    @property
    def steps(self) -> int:
        """Optimizer steps that are done."""
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def status(self) -> str:
        if self.complete:
            return "complete"
        if not self.steps:
            return "no step finished"
        return f"not complete: step {self.steps} of {self.config.get('train.steps', 'unknown')}"

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it has one."""
        found = [(row["step"], row[key]) for row in self.metrics if row.get(key) is not None]
        return [step for step, _ in found], [float(value) for _, value in found]


def read_runs(paths: Sequence[Path]) -> list[RecordedRun]:
    """The runs of these directories. Raises UsageError for one that is not a run directory."""
    for path in paths:
        if not RunDirectory(path).config_path.is_file():
            problem = "has no config.yaml" if path.exists() else "does not exist"
            raise UsageError(f"RUN: expected run directories of poweropd train; {path} {problem}")
    return [_read(name, path) for name, path in zip(_names(paths), paths, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for path, end in zip(paths, whole, strict=True) if whole.count(end) > 1)
        raise UsageError(f"RUN: {twice} is given twice")
    for depth in range(1, max(len(path.parts) for path in whole)):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in whole]


def _read(name: str, path: Path) -> RecordedRun:
    directory, notes = RunDirectory(path), list[str]()
    metrics = _metrics(directory.metrics_path, notes)
    rewards = RewardRecords.read(directory.rewards)
    run = RecordedRun(
        name=name,
        path=path,
        recipe=read_yaml(directory.config_path),
        environment=_json(path / "environment.json", notes) or {},
        metrics=metrics,
        rewards=rewards,
        evaluations=_evaluations(directory.evaluations, notes),
        gradients=_optional_json(path / "gradients.json", notes),
        complete=directory.final.exists(),
        notes=notes,
    )
    if rewards.unreadable:
        notes.append(f"reward records left out, unreadable: {', '.join(rewards.unreadable)}")
    elif not len(rewards.positions):
        notes.append("no reward records: figures of rewards by position are without this run")
    if not run.complete:
        notes.append(f"{run.status}; it is still going, or was stopped or broken off")
    return run


def _metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl, the last one of each step."""
    rows: dict[int, dict[str, Any]] = {}
    bad = 0
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:  # cut short, or not text
            row, bad = None, bad + 1
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[row["step"]] = row
    if bad:
        notes.append(f"metrics.jsonl: {bad} line{'s' * (bad > 1)} cut short or damaged, left out")
    return [rows[step] for step in sorted(rows)]


def _evaluations(folder: Path, notes: list[str]) -> list[BenchmarkAtStep]:
    found = []
    for path in sorted(folder.glob("step-*/results.json")):
        match, content = EVALUATED.fullmatch(path.parent.name), _json(path, notes)
        if match and content:
            found += [
                BenchmarkAtStep(int(match[1]), b, r) for b, r in content.get("results", {}).items()
            ]
    return sorted(found, key=lambda e: (e.step, e.benchmark))


def _optional_json(path: Path, notes: list[str]) -> dict[str, Any]:
    return (_json(path, notes) or {}) if path.exists() else {}


def _json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name}: cannot be read ({type(error).__name__})")
        return None
