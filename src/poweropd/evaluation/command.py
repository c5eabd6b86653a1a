"""What `poweropd eval` does, for a model or for completions from elsewhere."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from poweropd.data import read_rows
from poweropd.errors import UsageError
from poweropd.evaluation import benchmarks, results
from poweropd.evaluation.benchmarks import Problem
from poweropd.evaluation.grading import Grader
from poweropd.evaluation.metrics import summarize
from poweropd.evaluation.runner import Settings, evaluate, load_subject
from poweropd.records import write_atomically

UNKNOWN_STOP = "unknown"


@dataclass(frozen=True)
class Selection:
    """Which problems: benchmark names, files or Hub datasets, and where their columns are."""

    names: Sequence[str]
    limit: int | None = None
    data_dir: Path | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)

    def load(self) -> dict[str, list[Problem]]:
        if not self.names:
            known = ", ".join(benchmarks.BENCHMARKS)
            raise UsageError(f"--benchmark: expected one or more of {known}, a file or a dataset")
        return {
            Path(name).stem if Path(name).is_file() else name.replace("/", "--"): benchmarks.load(
                name, self.data_dir, self.limit, **self.columns
            )
            for name in self.names
        }


def measure(
    model: str,
    selection: Selection,
    settings: Settings,
    folder: Path,
    dtype: str,
    trust_remote_code: bool = False,
    k: int | None = None,
) -> dict[str, Any]:
    """Evaluates a model; returns what `--json` writes."""
    problems = selection.load()  # before any weight
    subject = load_subject(model, dtype, trust_remote_code)
    done = evaluate(subject, problems, settings, folder)
    figures = {name: one.rows for name, one in done.items()}
    return {
        "model": model,
        "settings": asdict(settings),
        "completions": str(folder),
        "results": {name: _result(rows, settings.n, k) for name, rows in figures.items()},
    }


def grade_file(
    path: Path, selection: Selection | None = None, k: int | None = None
) -> dict[str, Any]:
    """Grades the completions of a JSONL file: id, completion, and answer (the gold) in each line.

    Without `answer`, the gold and its rule are those of the selected benchmark's problem `id`.
    `sample`, `tokens` and `stop` are taken over where they are given.
    """
    golds = {} if selection is None else _by_id(selection.load())
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


def _by_id(problem_sets: Mapping[str, Sequence[Problem]]) -> dict[str, Problem]:
    return {problem.id: problem for problems in problem_sets.values() for problem in problems}


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


def show(report: Mapping[str, Any], json_file: Path | None, compare: Path | None) -> None:
    """Prints the tables and writes the JSON file."""
    console, found = Console(), report["results"]
    console.print(results.table(found, report.get("model") or report["graded"]))
    for note in results.notes(found):
        console.print(note)
    if compare is not None:
        console.print(results.comparison(found, results.read(compare), compare.stem))
    if json_file is not None:
        write_atomically(json_file, json.dumps(report, indent=2) + "\n")
        console.print(f"figures: {json_file}", soft_wrap=True)
    if "completions" in report:
        console.print(f"completions: {report['completions']}", soft_wrap=True)
