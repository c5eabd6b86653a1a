"""What `poweropd eval` does, for a model or for completions from elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from poweropd.data.prompts import read_rows
from poweropd.errors import RunError, UsageError
from poweropd.evaluation import benchmarks, results
from poweropd.evaluation.benchmarks import Problem
from poweropd.evaluation.metrics import summarize
from poweropd.evaluation.runner import evaluate, load_subject
from poweropd.evaluation.settings import BATCH_SIZE, EvaluationSettings
from poweropd.grading.grader import Grader
from poweropd.runs.files import write_json

UNKNOWN_STOP = "unknown"


@dataclass(frozen=True)
class ChosenBenchmarks:
    """Which problems: benchmark names, files or Hub datasets, and where their columns are."""

    names: Sequence[str]
    limit: int | None = None
    data_dir: Path | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)

    def load(self) -> dict[str, list[Problem]]:
        if not self.names:
            known = ", ".join(benchmarks.BENCHMARKS)
            raise UsageError(f"--benchmark: expected one or more of {known}, a file or a dataset")
        shown = {benchmarks.short_name(name): name for name in self.names}
        if len(shown) < len(self.names):
            raise UsageError(f"--benchmark: {', '.join(self.names)} do not have different names")
        return {
            short: benchmarks.load_benchmark(name, self.data_dir, self.limit, **self.columns)
            for short, name in shown.items()
        }


def evaluate_model(
    model: str,
    selection: ChosenBenchmarks,
    settings: EvaluationSettings,
    folder: Path,
    dtype: str,
    trust_remote_code: bool = False,
    k: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Any]:
    """Evaluates a model; returns what `--json` writes."""
    problems = selection.load()  # before any weight
    subject = load_subject(model, dtype, trust_remote_code, batch_size)
    try:
        done = evaluate(subject, problems, settings, folder)
    except torch.OutOfMemoryError:
        raise RunError(
            f"out of memory with --batch-size {batch_size}: run the same command with a smaller "
            "one and another --out"
        ) from None
    for evaluation in done.values():
        evaluation.check_not_empty()
    figures = {name: one.rows for name, one in done.items()}
    return {
        "model": model,
        "identity": subject.identity,
        "settings": asdict(settings),
        "completions": str(folder),
        "results": {name: _result(rows, settings.n, k) for name, rows in figures.items()},
    }


def grade_file(
    path: Path, selection: ChosenBenchmarks | None = None, k: int | None = None
) -> dict[str, Any]:
    """Grades the completions of a JSONL file: id, completion, and answer (the gold) in each line.

    With a benchmark selected, golds and rules are those of its problems, found by `id`.
    `sample`, `tokens` and `stop` are taken over where they are given.
    """
    problem_sets = {} if selection is None else selection.load()
    if len(problem_sets) > 1:
        raise UsageError("--grade: expected at most one benchmark, whose ids the lines have")
    golds = {p.id: p for problems in problem_sets.values() for p in problems}
    rows: list[dict[str, Any]] = []
    with Grader() as grader:
        pending = []
        for number, row in enumerate(read_rows(str(path), ["completion"], allow_empty=True), 1):
            problem = _gold(row, golds, f"{path}: row {number}")
            future = grader.submit(problem.answer, row["completion"], rule=problem.rule)
            pending.append((problem.id, row, future))
        samples: dict[str, int] = {}
        for id, row, future in track(pending, "grading", console=Console(stderr=True)):
            samples[id] = samples.get(id, -1) + 1
            rows.append(
                {
                    "id": id,
                    "sample": row.get("sample", samples[id]),
                    "tokens": row.get("tokens", 0),
                    "stop": row.get("stop", UNKNOWN_STOP),
                    **asdict(future.result()),
                }
            )
    name = path.stem
    return {"graded": str(path), "results": {name: _result(rows, None, k)}, "grades": rows}


def _gold(row: Mapping[str, Any], golds: Mapping[str, Problem], where: str) -> Problem:
    id = str(row.get("id", where))
    if id in golds:
        return golds[id]
    if row.get("answer") is None:
        raise UsageError(
            f"{where}: expected the gold in a field 'answer', or an id of the benchmark given by "
            f"--benchmark; got id {id!r} with neither"
        )
    return Problem(id, "", str(row["answer"]))


def _result(rows: Sequence[Mapping[str, Any]], n: int | None, k: int | None) -> results.Result:
    try:
        return results.result(summarize(rows, n=n, k=k), rows)
    except ValueError as error:
        raise UsageError(str(error)) from None


def show_results(report: Mapping[str, Any], json_file: Path | None, compare: Path | None) -> None:
    """Prints the tables and writes the JSON file."""
    console, found = Console(), report["results"]
    console.print(results.results_table(found, report.get("model") or report["graded"]))
    for note in results.grading_notes(found):
        console.print(note)
    if compare is not None:
        console.print(results.comparison_table(found, results.read_results(compare), compare.stem))
    if json_file is not None:
        write_json(json_file, report)
        console.print(f"figures: {json_file}", soft_wrap=True)
    if "completions" in report:
        console.print(f"completions: {report['completions']}", soft_wrap=True)
