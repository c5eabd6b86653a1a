"""What evaluations say: figures over steps, and a table of before, after and the teacher."""

from collections.abc import Mapping, Sequence

import altair

from poweropd.evaluation.metrics import Estimate, paired_bootstrap
from poweropd.report.curves import RUN, STEP, hovering, overlay
from poweropd.report.runs import RecordedRun, benchmarks
from poweropd.report.tables import ABSENT, Table
from poweropd.report.theme import Figure, TooltipField
from poweropd.runs.directory import is_number
from poweropd.runs.files import JsonObject

CHANGES = ["run", "measure", "before", "after", "after minus before", "teacher"]


def evaluation_figures(runs: Sequence[RecordedRun]) -> list[Figure]:
    """Returns a figure for each benchmark: Avg@k over steps with 95% intervals over problems."""
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

    One row for each run and benchmark. The change is paired by problem.
    """
    rows = [row for run in runs for row in _accuracy_changes(run)]
    if not rows:
        return None
    caption = (
        "What training changed, with 95% intervals: in accuracies over problems, and in the change "
        "over problems that are the same before and after. The teacher's own accuracy is how far "
        "one could get."
    )
    return Table(caption, CHANGES, rows)


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
                *(run.name, name, _percent(before), _percent(after, last)),
                ABSENT if change is None else _points(change),
                _percent(teacher),
            ]
        )
    return found


def _percent(result: JsonObject | None, step: int | None = None) -> str:
    if result is None:
        return ABSENT
    mean, low, high = (100 * result["avg_at_k"][key] for key in ("mean", "low", "high"))
    return f"{mean:.1f}% [{low:.1f}, {high:.1f}]" + ("" if step is None else f" at step {step}")


def _points(change: Estimate) -> str:
    mean, low, high = (100 * value for value in (change.mean, change.low, change.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


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
