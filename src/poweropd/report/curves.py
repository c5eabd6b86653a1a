"""Figures over training: the metrics of all runs overlaid, accuracy, and the time of a step."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair
import numpy as np

from poweropd.report.colours import line_styles
from poweropd.report.runs import RecordedRun
from poweropd.report.theme import (
    HEIGHT,
    WIDTH,
    Figure,
    TooltipField,
    named_rows,
    reward_axis,
    rounded,
    run_colour,
    run_dash,
    whole_row,
)
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import MEDIAN, OF_STEPS, Metric

POINTS = 250  # of a curve, at most; longer ones are drawn by buckets of steps
RUN, STEP = TooltipField("run", "run", "text"), TooltipField("step", "step")
FAINT = 0.3  # opacity of the raw line behind the smoothed one


def training(runs: Sequence[RecordedRun], bounds: Sequence[float]) -> list[Figure]:
    """Returns one figure for each metric that a run has.

    `bounds`: those of the runs' rewards.
    """
    width = bucket_width(runs)
    figures = list[Figure]()
    for metric in OF_STEPS:
        log = metric.curve == "log"
        found = [row for run in runs for row in curve_rows(run, metric.key, width, log)]
        if metric.curve and found:
            figures.append(curve_figure(metric, runs, found, width, bounds))
    return figures


def bucket_width(runs: Sequence[RecordedRun]) -> int:
    """Returns the number of steps that share a point."""
    return max(1, -(-max(run.steps for run in runs) // POINTS))


def curve_rows(
    run: RecordedRun, metric: str, width: int, positive: bool = False
) -> Iterator[JsonObject]:
    """Yields mean, lowest and highest value of each bucket of `width` steps.

    positive: values that a logarithmic axis cannot show are left out.
    """
    steps, values = (np.array(column) for column in run.series(metric))
    keep = np.isfinite(values) & ((values > 0) | (not positive))
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


def curve_axis(
    kind: str | None, values: Sequence[float], bounds: Sequence[float]
) -> dict[str, Any]:
    """Returns the axis of a metric's values: logarithmic, of rewards, from 0, or around them."""
    if kind == "reward":
        return reward_axis(values, None, bounds)
    scale = altair.Scale(type="log") if kind == "log" else altair.Scale(zero=kind == "zero")
    if kind == "zero" and not any(values):
        scale = altair.Scale(domain=[0, 1])  # else the line of zeros would be in mid-air
    return {"title": None, "scale": scale}


def curve_figure(
    metric: Metric,
    runs: Sequence[RecordedRun],
    found: list[JsonObject],
    width: int,
    bounds: Sequence[float],
) -> Figure:
    """Draws a smoothed line over the faint line of means, in a band from lowest to highest value.

    The page puts the smoothed values in the field `smooth`; without them, it is the means' line.
    """
    title = metric.heading[0].upper() + metric.heading[1:]
    axis = curve_axis(metric.curve, [row[end] for row in found for end in ("low", "high")], bounds)
    base = overlay(runs).encode(x=altair.X("step:Q", title="optimizer step"))
    base = base.transform_calculate(line="isValid(datum.smooth) ? datum.smooth : datum.mean")
    band = base.mark_area(opacity=0.15).encode(y=altair.Y("low:Q", **axis), y2="high:Q")
    dash = run_dash([run.name for run in runs], line_styles([r.reward_setting for r in runs]))
    raw = base.mark_line(strokeWidth=1.2, opacity=FAINT).encode(y=altair.Y("mean:Q", **axis))
    line = base.mark_line(strokeWidth=1.8).encode(y=altair.Y("line:Q", **axis), strokeDash=dash)
    layers = [band, raw, line] if width > 1 else [raw, line]
    said = f", mean of every {width} steps, with the range of their values" if width > 1 else ""
    note = f" {metric.note}" if metric.note else ""
    many = width > 1
    return Figure(
        key=metric.key.replace("/", "-"),
        title=title,
        description=f"{title} over optimizer steps, one line a run{said}.{note}",
        chart=hovering(layers, line),
        rows=found,
        tooltip=[
            *(RUN, STEP, TooltipField("mean", "mean" if many else "value")),
            TooltipField("smooth", "smoothed"),
            *([TooltipField("low", "lowest"), TooltipField("high", "highest")] if many else []),
        ],
        by_run=True,
        smooth=True,
    )


def overlay(runs: Sequence[RecordedRun]) -> altair.Chart:
    """Returns a chart in the colours of the runs, without those that the reader switched off."""
    shown = altair.Chart(named_rows()).transform_filter("indexof(hidden_runs, datum.run) < 0")
    colours = [style.colour for style in line_styles([run.reward_setting for run in runs])]
    return shown.encode(color=run_colour([run.name for run in runs], colours))


def hovering(layers: Sequence[altair.Chart], line: altair.Chart) -> altair.LayerChart:
    """Returns the layers with a point of `line` and its row under the pointer."""
    near = altair.selection_point(
        name="near", nearest=True, on="pointermove", clear="pointerout", empty=False
    )
    points = line.mark_point(filled=True, size=60, tooltip=whole_row()).encode(
        opacity=altair.condition(near, altair.value(1), altair.value(0))
    )
    # Filled points would hide the legend's lines, and have no dashes.
    points.encoding.strokeDash = altair.Undefined
    hidden = altair.param(name="hidden_runs", value=[])
    layered = altair.layer(*layers, points.add_params(near)).add_params(hidden)
    return layered.properties(width=WIDTH, height=HEIGHT)


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
        .mark_bar(tooltip=whole_row())
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
        )
        .properties(width=WIDTH, height=30 * len(runs))
    )
    description = "Median seconds of each phase of a step, stacked, one bar a run."
    tooltip = [
        *(RUN, TooltipField("phase", "phase", "text"), TooltipField("seconds", "seconds")),
        TooltipField("share", "of the step", "percent"),
    ]
    title, height = "Where the time of a step goes", 130 + 34 * len(runs)
    return [Figure("phases", title, description, chart, found, tooltip, height=height)]
