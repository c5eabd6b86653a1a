"""What evaluations say: figures over steps, and a table of before, after and the teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import altair

from poweropd.evaluation.divergence import PromptTotals, paired_differences
from poweropd.evaluation.metrics import Estimate, paired_bootstrap
from poweropd.report.curves import RUN, STEP, hovering, overlay
from poweropd.report.runs import RecordedRun, benchmarks
from poweropd.report.tables import ABSENT, PERCENT, Table, interval
from poweropd.report.theme import Figure, TooltipField
from poweropd.runs.directory import is_number
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import OF_DIVERGENCE, Shown

CHANGES = ["measure", "run", "before", "after", "after minus before", "teacher"]


def evaluation_figures(runs: Sequence[RecordedRun]) -> list[Figure]:
    """Returns a figure for each benchmark and each measure of the divergence, over steps."""
    return [*_benchmark_figures(runs), *_divergence_figures(runs)]


def _benchmark_figures(runs: Sequence[RecordedRun]) -> list[Figure]:
    found = []
    for benchmark in benchmarks(runs):
        rows = [
            {"run": run.name, "step": step, **result["avg_at_k"]}
            for run in runs
            for step, result in run.results(benchmark)
        ]
        key = "accuracy-" + "".join(c if c.isalnum() else "-" for c in benchmark)
        said = f"Avg@k on {benchmark} over steps, with 95% intervals over its problems."
        found.append(
            _estimates_over_steps(runs, key, f"Accuracy on {benchmark}", said, rows, "percent")
        )
    return found


def _divergence_figures(runs: Sequence[RecordedRun]) -> list[Figure]:
    found = []
    for name, metric in OF_DIVERGENCE.items():
        rows = [
            {"run": run.name, "step": step, **figures[name]}
            for run in runs
            for step, figures in run.divergences.items()
            if name in figures
        ]
        if not metric.curve or not rows:
            continue
        title = metric.title[0].upper() + metric.title[1:]
        unit = "Over" if metric.unit == "share" else f"In {metric.unit}, over"
        said = f"{unit} steps, with 95% intervals over the prompts."
        sampled = [run.name for run in runs if run.has_sampled_divergence]
        if name == "reverse_kl" and sampled:
            said += f" A sampled estimate in {', '.join(sampled)}."
        key, kind = metric.key.replace("/", "-"), "percent" if metric.unit == "share" else "number"
        found.append(_estimates_over_steps(runs, key, title, said, rows, kind))
    return found


def _estimates_over_steps(
    runs: Sequence[RecordedRun],
    key: str,
    title: str,
    description: str,
    rows: Sequence[JsonObject],
    kind: str,
) -> Figure:
    """Draws estimates over steps: points on a line in a band between the intervals' ends."""
    base = overlay(runs).encode(x=altair.X("step:Q", title="optimizer step"))
    axis = altair.Axis(format=".0%") if kind == "percent" else altair.Axis()
    scale = altair.Scale(zero=False)
    y = altair.Y("mean:Q", title=None, axis=axis, scale=scale)
    low = altair.Y("low:Q", title=None, axis=axis, scale=scale)
    band = base.mark_area(opacity=0.12).encode(y=low, y2="high:Q")
    ends = base.mark_rule(opacity=0.4).encode(y=low, y2="high:Q")
    line = base.mark_line(point=True).encode(y=y)
    interval = ("low", "interval from"), ("high", "to")
    return Figure(
        key=key,
        title=title,
        description=description,
        chart=hovering([band, ends, line], line),
        rows=rows,
        tooltip=[
            *(RUN, STEP, TooltipField("mean", "mean", kind)),
            *(TooltipField(field, said, kind) for field, said in interval),
        ],
        by_run=True,
    )


def change_table(runs: Sequence[RecordedRun]) -> Table | None:
    """Returns what training changed, or None if no run was evaluated before it or had a teacher.

    One row for each run and measure. The change is paired by problem or by held-out prompt.
    """
    rows = [row for run in runs for row in (*_accuracy_changes(run), *_divergence_changes(run))]
    if not rows:
        return None
    caption = (
        "What training changed, with 95% intervals over problems, or over held-out prompts. The "
        "change is paired: the same problems or prompts before and after. The teacher's own "
        "accuracy is how far one could get."
    )
    order = list(dict.fromkeys(measure for measure, *_ in rows))
    rows.sort(key=lambda row: order.index(row[0]))  # stable: runs stand side by side
    return Table(caption, CHANGES, rows, names=2)


def _accuracy_changes(run: RecordedRun) -> list[list[str]]:
    found = []
    for name in benchmarks([run]) or [*run.teacher]:
        steps = dict(run.results(name))
        before, teacher = steps.pop(0, None), run.teacher.get(name)
        if before is None and teacher is None:
            continue
        last = max(steps, default=None)
        after = None if last is None else steps[last]
        change = _paired_change(after, before)
        found.append(
            [
                *(name, run.name, _percent(before), _percent(after, last)),
                ABSENT if change is None else _points(change),
                _percent(teacher),
            ]
        )
    return found


def _divergence_changes(run: RecordedRun) -> list[list[str]]:
    steps = dict(run.divergences)
    before, last = steps.pop(0, None), max(steps, default=None)
    if before is None:
        return []
    after = {} if last is None else steps[last]
    changes = {} if last is None else _paired_changes(run, last)
    sampled = run.has_sampled_divergence
    found = []
    for name, metric in OF_DIVERGENCE.items():
        if name not in before:
            continue
        cell = metric.table or Shown(metric.title, "g")
        note = ", a sampled estimate" if sampled and name == "reverse_kl" else ""
        shown = [
            interval(before[name], cell),
            f"{interval(after[name], cell)} at step {last}" if name in after else ABSENT,
            interval(changes[name], _signed(cell)) if name in changes else ABSENT,
        ]
        found.append([f"{metric.measure}{note}", run.name, *shown, ABSENT])
    return found


def _paired_changes(run: RecordedRun, last: int) -> dict[str, JsonObject]:
    """Returns each figure's change since step 0; {} if the prompts are not the same."""
    after, before = (_totals(run.divergence_facts.get(step, {})) for step in (last, 0))
    if not after or after.keys() != before.keys():
        return {}
    changes = paired_differences(after, before)
    return {name: asdict(change) for name, change in changes.items()}


def _totals(facts: JsonObject) -> Mapping[str, PromptTotals]:
    """Returns each prompt's sums; {} if a damaged file does not have them."""
    found = facts.get("per_prompt")
    whole = isinstance(found, dict) and all(
        isinstance(own, dict) and all(is_number(own.get(k)) for k in PromptTotals.__annotations__)
        for own in found.values()
    )
    return found if isinstance(found, dict) and whole else {}


def _percent(result: JsonObject | None, step: int | None = None) -> str:
    if result is None:
        return ABSENT
    shown = interval(result["avg_at_k"], PERCENT)
    return shown if step is None else f"{shown} at step {step}"


def _points(change: Estimate) -> str:
    return interval(asdict(change), _signed(Shown("", ".1f", factor=100.0)))


def _signed(cell: Shown) -> Shown:
    return replace(cell, format=f"+{cell.format}")


def _paired_change(after: JsonObject | None, before: JsonObject | None) -> Estimate | None:
    """Returns the change of the correct fraction, or None if the problems are not the same."""
    if after is None or before is None:
        return None
    solved = [_solved(after), _solved(before)]
    if not solved[0] or solved[0].keys() != solved[1].keys():
        return None
    return paired_bootstrap(*solved)


def _solved(result: JsonObject) -> Mapping[str, float]:
    """Returns each problem's correct fraction; {} if a damaged file does not have them."""
    found = result.get("solved")
    whole = isinstance(found, dict) and all(is_number(value) for value in found.values())
    return found if isinstance(found, dict) and whole else {}
