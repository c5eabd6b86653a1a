"""Figures over training: the metrics of all runs overlaid, accuracy, and the time of a step."""

from collections.abc import Iterator, Sequence
from typing import Literal

import altair
import numpy as np

from poweropd.report.runs import RecordedRun, benchmarks
from poweropd.report.theme import HEIGHT, WIDTH, Figure, named_rows, rounded, run_colour
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import MEDIAN, OF_STEPS, Metric

POINTS = 250  # of a curve, at most; longer ones are drawn by buckets of steps
ScaleType = Literal["linear", "log"]


def training(runs: Sequence[RecordedRun]) -> list[Figure]:
    """Returns one figure for each metric that a run has, and accuracy where it was measured."""
    width, names = bucket_width(runs), [run.name for run in runs]
    figures = accuracy(runs)
    for metric, scale in ((m, m.curve) for m in OF_STEPS if m.curve):
        found = [row for run in runs for row in curve_rows(run, metric.key, width, scale)]
        if found:
            figures.append(curve_figure(metric, names, found, width))
    return figures


def bucket_width(runs: Sequence[RecordedRun]) -> int:
    """Returns the number of steps that share a point."""
    return max(1, -(-max(run.steps for run in runs) // POINTS))


def curve_rows(
    run: RecordedRun, metric: str, width: int, scale: ScaleType = "linear"
) -> Iterator[JsonObject]:
    """Yields mean, lowest and highest value of each bucket of `width` steps."""
    steps, values = (np.array(column) for column in run.series(metric))
    keep = np.isfinite(values) & ((values > 0) | (scale != "log"))
    steps, values = steps[keep], values[keep]
    if not len(steps):
        return
    starts = np.flatnonzero(np.diff((steps - 1) // width, prepend=-1))
    counts = np.diff(starts, append=len(steps))
    columns = (
        np.add.reduceat(steps, starts) / counts,
        np.add.reduceat(values, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )
    for step, mean, low, high in zip(*(column.tolist() for column in columns), strict=True):
        row = {"mean": mean, "low": low, "high": high}
        yield {"run": run.name, "step": step, **{k: rounded(v, 5) for k, v in row.items()}}


def curve_figure(
    metric: Metric, names: Sequence[str], found: list[JsonObject], width: int
) -> Figure:
    """Draws the mean as a line in a band from the lowest to the highest value of a bucket."""
    title = metric.heading[0].upper() + metric.heading[1:]
    base = overlay(names).encode(x=altair.X("step:Q", title="optimizer step"))
    axis = altair.Scale(type="log") if metric.curve == "log" else altair.Scale(zero=False)
    band = base.mark_area(opacity=0.15).encode(
        y=altair.Y("low:Q", title=None, scale=axis), y2="high:Q"
    )
    line = base.mark_line(strokeWidth=1.8).encode(y=altair.Y("mean:Q", title=None, scale=axis))
    layers = [band, line] if width > 1 else [line]
    said = f", mean of every {width} steps, with the range of their values" if width > 1 else ""
    return Figure(
        key=metric.key.replace("/", "-"),
        title=title,
        description=f"{title} over optimizer steps, one line a run{said}.",
        chart=hovering(layers, line),
        rows=found,
        by_run=True,
    )


def overlay(names: Sequence[str]) -> altair.Chart:
    """Returns a chart in the colours of the runs, without those that the reader switched off."""
    shown = altair.Chart(named_rows()).transform_filter("indexof(hidden_runs, datum.run) < 0")
    return shown.encode(color=run_colour(names))


def hovering(layers: Sequence[altair.Chart], line: altair.Chart) -> altair.LayerChart:
    """Returns the layers with a point of `line` and its row under the pointer."""
    near = altair.selection_point(
        name="near", nearest=True, on="pointermove", clear="pointerout", empty=False
    )
    # The tooltip shows the whole row: Vega-Lite 6.4 loses the names of single fields on a nearest
    # point.
    points = line.mark_point(filled=True, size=60, tooltip=altair.TooltipContent("data")).encode(
        opacity=altair.condition(near, altair.value(1), altair.value(0))
    )
    points.encoding.strokeDash = altair.Undefined  # filled points would hide its legend's lines
    hidden = altair.param(name="hidden_runs", value=[])
    layered = altair.layer(*layers, points.add_params(near)).add_params(hidden)
    return layered.properties(width=WIDTH, height=HEIGHT)


def accuracy(runs: Sequence[RecordedRun]) -> list[Figure]:
    """Returns a figure for each benchmark: Avg@k over steps with 95% intervals over problems."""
    figures = []
    names = [run.name for run in runs]
    for benchmark in benchmarks(runs):
        found = [
            {"run": run.name, "step": step, **result["avg_at_k"]}
            for run in runs
            for step, result in run.results(benchmark)
        ]
        base = overlay(names).encode(x=altair.X("step:Q", title="optimizer step"))
        percent, scale = altair.Axis(format=".0%"), altair.Scale(zero=False)
        line = base.mark_line(point=True).encode(
            y=altair.Y("mean:Q", title=None, axis=percent, scale=scale)
        )
        bars = base.mark_rule(opacity=0.5).encode(y=altair.Y("low:Q", title=None), y2="high:Q")
        description = f"Avg@k on {benchmark} over steps, with 95% intervals over its problems."
        chart = hovering([bars, line], line)
        title = f"Accuracy on {benchmark}"
        key = "accuracy-" + "".join(c if c.isalnum() else "-" for c in benchmark)
        figures.append(Figure(key, title, description, chart, found, by_run=True))
    return figures


def phases(runs: Sequence[RecordedRun]) -> list[Figure]:
    """Returns the figure of a step's phases: their median seconds, stacked."""
    found = []
    for run in runs:
        keys = dict.fromkeys(key for row in run.metrics for key in row if "seconds/" in key)
        medians = {k.removeprefix("seconds/"): MEDIAN.of(run.metrics, k) or 0.0 for k in keys}
        whole = medians.pop("step", 0.0)
        if "record" in medians:  # the last thing that a step does
            medians["record"] = medians.pop("record")
        medians["other"] = max(0.0, whole - sum(medians.values()))
        found += [
            {"run": run.name, "phase": p, "order": i, "seconds": round(s, 6), "share": s / whole}
            for i, (p, s) in enumerate(medians.items())
            if whole
        ]
    if not found:
        return []
    chart = (
        altair.Chart(named_rows())
        .mark_bar()
        .encode(
            x=altair.X("seconds:Q", title="seconds per step (median)"),
            y=altair.Y("run:N", title=None, sort=[run.name for run in runs]),
            color=altair.Color(
                "phase:N",
                title=None,
                scale=altair.Scale(scheme="tableau10"),
                sort=None,
                legend=altair.Legend(orient="bottom", columns=4, symbolType="square"),
            ),
            order="order:Q",
            tooltip=["run:N", "phase:N", "seconds:Q", altair.Tooltip("share:Q", format=".1%")],
        )
        .properties(width=WIDTH, height=30 * len(runs))
    )
    description = "Median seconds of each phase of a step, stacked, one bar a run."
    return [Figure("phases", "Where the time of a step goes", description, chart, found)]
