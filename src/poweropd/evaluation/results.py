"""What an evaluation says: a table for people, a JSON file for programs, a comparison of two."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from poweropd.errors import UsageError
from poweropd.evaluation.metrics import Estimate, Summary, paired_bootstrap, problem_values

Result = dict[str, Any]


def result(summary: Summary, rows: Sequence[Mapping[str, Any]]) -> Result:
    """One benchmark's figures and each problem's correct fraction, ready for JSON."""
    return {**asdict(summary), "solved": problem_values(rows)}


def results_table(results: Mapping[str, Result], title: str) -> Table:
    """One row a benchmark and, of several, their plain mean."""
    shown = Table(title=title)
    k = next(iter(results.values()))["k"]
    for column in ("", f"Avg@{k}", f"Pass@{k}", "Len", "truncated", "no answer"):
        shown.add_column(column, justify="right" if column else "left")
    for name, one in results.items():
        shown.add_row(
            f"{name}\n{one['problems']} problems",
            _percent(one["avg_at_k"]),
            _percent(one["pass_at_k"]),
            _interval(one["mean_length"], 1.0, 0),
            _percent(one["truncated_fraction"]),
            _percent(one["no_answer_fraction"]),
        )
    if len(results) > 1:
        means = [
            f"{100 * sum(one[key]['mean'] for one in results.values()) / len(results):.2f}"
            for key in ("avg_at_k", "pass_at_k")
        ]
        shown.add_row("mean", *means, "", "", "")
    return shown


def grading_notes(results: Mapping[str, Result]) -> list[str]:
    """What a reader of the table should know: grades that are not about the answer."""
    said = []
    for name, one in results.items():
        for reason in ("crash", "timeout", "unparsed_gold"):
            if one["reasons"].get(reason):
                count = one["reasons"][reason]
                said.append(f"{name}: {count} completions counted as wrong for reason {reason!r}")
    return said


def read_results(path: Path) -> dict[str, Result]:
    """The results of a file that `poweropd eval --json` wrote."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["results"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: expected a file written by poweropd eval --json ({type(error).__name__})"
        ) from None


def comparison_table(
    results: Mapping[str, Result], other: Mapping[str, Result], name: str
) -> Table:
    """Differences in accuracy, paired by problem, on the benchmarks that both have."""
    shared = [benchmark for benchmark in results if benchmark in other]
    if not shared:
        raise UsageError(
            f"{name} shares no benchmark with this evaluation: it has {', '.join(other)}"
        )
    shown = Table(title=f"Accuracy minus {name}, paired by problem")
    for column in ("benchmark", "difference [95%]"):
        shown.add_column(column, justify="left" if column == "benchmark" else "right")
    for benchmark in shared:
        try:
            difference = paired_bootstrap(results[benchmark]["solved"], other[benchmark]["solved"])
        except ValueError as error:
            raise UsageError(f"{name}: {benchmark}: {error}") from None
        shown.add_row(benchmark, _percent(asdict(difference), "+"))
    return shown


def _percent(estimate: Mapping[str, float], sign: str = "") -> str:
    return _interval(estimate, 100.0, 2, sign)


def _interval(estimate: Mapping[str, float], factor: float, digits: int, sign: str = "") -> str:
    mean, low, high = (factor * estimate[key] for key in asdict(Estimate(0, 0, 0)))
    form = f"{sign}.{digits}f"
    return f"{mean:{form}}\n[{low:{form}}, {high:{form}}]"  # two lines: tables stay narrow
