"""Does the work of `poweropd eval`, for a model or for completions from elsewhere."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from rich.progress import track

from poweropd.data.sources import read_rows
from poweropd.errors import RunError, UsageError, shown
from poweropd.evaluation import benchmarks, results
from poweropd.evaluation.benchmarks import Problem, ProblemSet
from poweropd.evaluation.metrics import GradedRow, Summary, check_row, summarize
from poweropd.evaluation.settings import BATCH_SIZE, EvaluationSettings
from poweropd.grading.grader import Grader
from poweropd.grading.graders.base import NamedGrader, create_grader
from poweropd.runs.files import write_json
from poweropd.terminal import make_console

logger = logging.getLogger("poweropd")

UNKNOWN_STOP = "unknown"


@dataclass(frozen=True)
class Report:
    """The figures of an evaluation by benchmark.

    title: the model, or the file that was graded.
    facts: further values for the JSON file.
    grades: the rows of a graded file; the rows of a model are in its folder of completions.
    """

    title: str
    results: Mapping[str, Summary]
    facts: Mapping[str, object]
    grades: Sequence[GradedRow] | None = None

    def to_dict(self) -> dict[str, object]:
        """Returns the content of the JSON file."""
        found = {**self.facts, "results": {name: asdict(one) for name, one in self.results.items()}}
        return found if self.grades is None else {**found, "grades": self.grades}


def chosen_problems(
    names: Sequence[str],
    data: Path | None,
    limit: int | None,
    columns: Mapping[str, str | None],
    grader: NamedGrader,
) -> dict[str, list[Problem]]:
    """Loads benchmarks, files or Hub datasets; returns short name -> problems.

    data: a folder with NAME.jsonl, read instead of the Hub; columns: see `load_benchmark`.
    """
    shown = {benchmarks.short_name(name): name for name in names}
    if len(shown) < len(names):
        raise UsageError(f"--benchmark: {', '.join(names)} do not have different names")
    return {
        short: benchmarks.load_benchmark(name, data, limit, grader=grader, **columns)
        for short, name in shown.items()
    }


def file_name(address: str) -> str:
    """Returns a model's or file's address as the name of a folder."""
    return address.strip("/").replace("/", "--").replace(":", "-")


def judged_folder(folder: Path, teacher: str, prompts: str) -> Path:
    """Returns where completions are kept that a teacher judges."""
    return folder / f"beside-{file_name(teacher)}" / file_name(prompts)


def evaluate_model(
    model: str,
    problem_sets: Mapping[str, Sequence[Problem]],
    settings: EvaluationSettings,
    grader: NamedGrader,
    folder: Path,
    dtype: str,
    trust_remote_code: bool = False,
    k: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> Report:
    """Evaluates a model on benchmarks, name -> problems, and keeps its completions in `folder`."""
    if not problem_sets:
        known = ", ".join(benchmarks.BENCHMARKS)
        raise UsageError(f"--benchmark: expected one or more of {known}, a file or a dataset")
    counts = [f"{name} ({len(own)} problems)" for name, own in problem_sets.items()]
    logger.info("%s on %s, completions of each: %d", model, ", ".join(counts), settings.n)
    import torch

    from poweropd.evaluation.runner import load_subject, run_benchmarks

    subject = load_subject(model, dtype, trust_remote_code, batch_size)
    asked = {name: ProblemSet(own, settings, grader) for name, own in problem_sets.items()}
    try:
        done = run_benchmarks(subject, asked, folder)
    except torch.OutOfMemoryError:
        raise RunError(
            f"out of memory with --batch-size {batch_size}: run the same command with a smaller "
            "one and another --out"
        ) from None
    for evaluation in done.values():
        evaluation.check_not_empty()
    figures = {name: _summary(one.rows, settings.n, k) for name, one in done.items()}
    facts = {"model": model, "identity": subject.identity, "settings": asdict(settings)}
    return Report(model, figures, {**facts, "completions": str(folder)})


def named_grader(named: str) -> NamedGrader:
    """Returns the grader that the command line names."""
    return create_grader("--grader", named)


def grade_file(
    path: Path,
    problem_sets: Mapping[str, Sequence[Problem]],
    grader: NamedGrader = benchmarks.MATH,
    answer_column: str | None = None,
    k: int | None = None,
) -> Report:
    """Grades the completions of a JSONL file: id, completion, and answer (the gold) in each line.

    If a benchmark is given, golds and rules are those of its problems, found by `id`.
    `sample`, `tokens` and `stop` are taken over if they are given.
    """
    from poweropd.evaluation.runner import graded_part

    if len(problem_sets) > 1:
        raise UsageError("--grade: expected at most one benchmark, whose ids the lines have")
    golds = {p.id: p for problems in problem_sets.values() for p in problems}
    rows: list[GradedRow] = []
    with Grader() as workers:
        pending = []
        column = answer_column or "answer"
        for number, row in enumerate(read_rows(str(path), ["completion"], allow_empty=True), 1):
            _check_given(row, f"{path}: row {number}")
            problem = _problem(row, golds, column, f"{path}: row {number}", grader)
            future = grader.submit(workers, problem.asked(str(path)), row["completion"])
            pending.append((problem.id, row, future))
        samples: dict[str, int] = {}
        for id, row, future in track(pending, "grading", console=make_console(stderr=True)):
            samples[id] = samples.get(id, -1) + 1
            given = {
                "id": id,
                "sample": row.get("sample", samples[id]),
                "tokens": row.get("tokens", 0),
                "stop": row.get("stop", UNKNOWN_STOP),
                "completion": row["completion"],
            }
            rows.append(cast(GradedRow, given | graded_part(future.result())))
    figures = _summary(rows, None, k)
    for graded in rows:  # which the user's file has
        graded.pop("completion", None)
    return Report(str(path), {path.stem: figures}, {"graded": str(path)}, rows)


def _summary(rows: Sequence[GradedRow], n: int | None, k: int | None) -> Summary:
    try:
        return summarize(rows, n=n, k=k)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_given(row: Mapping[str, object], where: str) -> None:
    """Raises UsageError if a field that is taken over, or the completion, cannot be one."""
    given = {key: row[key] for key in ("sample", "completion", "tokens", "stop") if key in row}
    try:
        check_row(given, needed=())
    except ValueError as error:
        raise UsageError(f"{where}: {error}; correct it or leave it out") from None


def _problem(
    row: Mapping[str, object],
    golds: Mapping[str, Problem],
    column: str,
    where: str,
    grader: NamedGrader,
) -> Problem:
    """Returns the problem that a row names or, without one, a problem with the row's own answer."""
    id = str(row.get("id", where))
    if id in golds:
        return golds[id]
    if grader.needs_gold and row.get(column) is None:
        raise UsageError(
            f"{where}: expected the gold in a field {column!r}, or an id of the benchmark given by "
            f"--benchmark; got id {shown(id)} with neither"
        )
    return Problem(id, "", benchmarks.gold_of(row, column, where, grader), row=row)


def show_report(report: Report, json_file: Path | None, compare: Path | None) -> None:
    """Prints the tables of a report and writes its JSON file."""
    console = make_console()
    console.print(results.results_table(report.results, report.title))
    for note in results.grading_notes(report.results):
        console.print(note, markup=False, highlight=False)
    if compare is not None:
        solved = results.read_solved(compare)
        console.print(results.comparison_table(report.results, solved, compare.stem))
    if json_file is not None:
        write_json(json_file, report.to_dict())
        console.print(f"figures: {json_file}", soft_wrap=True)
    if "completions" in report.facts:
        console.print(f"completions: {report.facts['completions']}", soft_wrap=True)
