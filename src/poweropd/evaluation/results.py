"""Shows what an evaluation measured: a table, notes, and a comparison with another evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from poweropd.errors import UNREADABLE, UsageError, shown
from poweropd.evaluation.metrics import NO_ANSWER, Estimate, Summary, paired_bootstrap

#: Reasons of grades that are not about the answer, which a reader of the table should know.
_NOTED = ("crash", "timeout", "unparsed_gold")


def results_table(results: Mapping[str, Summary], title: str) -> Table:
    """Returns a table with a line for each benchmark and, if there are several, for their mean."""
    table = Table(title=title)
    ks = {one.k for one in results.values()}
    k = ks.pop() if len(ks) == 1 else "k"
    for column in ("", f"Avg@{k}", f"Pass@{k}", "Len", "truncated", "no answer"):
        table.add_column(column, justify="right" if column else "left")
    for name, one in results.items():
        table.add_row(
            f"{name}\n{one.problems} problems" + (f", k = {one.k}" if k == "k" else ""),
            _with_interval(one.avg_at_k),
            _with_interval(one.pass_at_k),
            _with_interval(one.mean_length, "{:.0f}", factor=1.0),
            _with_interval(one.truncated_fraction),
            _with_interval(one.no_answer_fraction),
        )
        for score, estimate in one.scores.items():
            table.add_row(f"  {score}", _with_interval(estimate, "{:.3f}", factor=1.0))
    if len(results) > 1:
        average = 100 * sum(one.avg_at_k.mean for one in results.values()) / len(results)
        passed = 100 * sum(one.pass_at_k.mean for one in results.values()) / len(results)
        table.add_row("mean", f"{average:.2f}", f"{passed:.2f}", "", "", "")
    return table


def grading_notes(results: Mapping[str, Summary]) -> list[str]:
    """Returns a line for each count of grades that are not about the answer, and for benchmarks in
    which answers were hardly found.
    """
    lacking = [unanswered_note(name, one) for name, one in results.items() if one.unanswered]
    return lacking + [
        f"{name}: {one.reasons[reason]} completions counted as wrong for reason {reason!r}"
        for name, one in results.items()
        for reason in _NOTED
        if one.reasons.get(reason)
    ]


def unanswered_note(name: str, result: Summary) -> str:
    """Returns what to say where the grader finds no answer in more than half of the completions."""
    count, total = result.reasons.get(NO_ANSWER, 0), result.problems * result.n
    texts = "\n".join(f"    {shown(text, 2 * len(text) + 2)}" for text in result.unanswered)
    return (
        f"{name}: the grader finds no answer in {count} of {total} completions: tell the model how "
        'to end (an instruction such as "End with: Answer: ..."), raise max_new_tokens if they '
        f"are truncated, or choose another grader. Three of them:\n{texts}"
    )


def read_solved(path: Path) -> dict[str, dict[str, float]]:
    """Reads, from a file of `poweropd eval --json`, benchmark -> problem id -> correct fraction."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        solved = {name: dict(result["solved"]) for name, result in results.items()}
        if not all(_is_fraction(value) for one in solved.values() for value in one.values()):
            raise ValueError
        return solved
    except (OSError, KeyError, TypeError, AttributeError, *UNREADABLE) as error:
        raise UsageError(
            f"{path}: expected a file written by poweropd eval --json ({type(error).__name__})"
        ) from None


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def comparison_table(
    results: Mapping[str, Summary], other: Mapping[str, Mapping[str, float]], name: str
) -> Table:
    """Returns differences in accuracy, paired by problem, on the benchmarks that both have."""
    shared = [benchmark for benchmark in results if benchmark in other]
    if not shared:
        raise UsageError(
            f"{name} shares no benchmark with this evaluation: it has {shown(list(other))}"
        )
    table = Table(title=f"Accuracy minus {name}, paired by problem")
    table.add_column("benchmark")
    table.add_column("difference [95%]", justify="right")
    for benchmark in shared:
        try:
            difference = paired_bootstrap(results[benchmark].solved, other[benchmark])
        except ValueError as error:
            raise UsageError(f"{name}: {benchmark}: {error}") from None
        table.add_row(benchmark, _with_interval(difference, "{:+.2f}"))
    return table


def _with_interval(estimate: Estimate, form: str = "{:.2f}", factor: float = 100.0) -> str:
    """Formats an estimate on two lines, which keep tables narrow; the factor makes percentages."""
    ends = (estimate.mean, estimate.low, estimate.high)
    return f"{form}\n[{form}, {form}]".format(*(factor * end for end in ends))
