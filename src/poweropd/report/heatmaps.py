"""Heat maps of the mean reward over position and step."""

from collections.abc import Iterator, Sequence

import altair
import numpy as np

from poweropd.report.runs import RecordedRun
from poweropd.report.theme import (
    WIDTH,
    Figure,
    TooltipField,
    named_rows,
    position_axis,
    rounded,
    whole_row,
)
from poweropd.runs.bins import POSITION_STARTS
from poweropd.runs.files import JsonObject
from poweropd.runs.statistics import UNIT, totals

STEPS = 40  # columns of a heatmap, at most
TOOLTIP = (
    TooltipField("step", "step"),
    TooltipField("position", "position"),
    TooltipField("mean", "mean reward"),
    TooltipField("low", "lowest"),
    TooltipField("high", "highest"),
)


def position_and_step(runs: Sequence[RecordedRun]) -> list[Figure]:
    """Returns figures of the mean reward over completion position and step, one for each run."""
    figures = []
    for number, run in enumerate(runs, 1):
        found = list(_cells(run))
        if not found:
            continue
        largest = float(np.quantile([abs(row["mean"]) for row in found], 0.99)) or 1.0
        ends = [row["position_end"] for row in found]
        axis = position_axis(ends, "position in the completion")
        chart = (
            altair.Chart(named_rows())
            .mark_rect(tooltip=whole_row())
            .encode(
                x=altair.X("step:Q", title="optimizer step", scale=altair.Scale(nice=False)),
                x2="step_end:Q",
                y=altair.Y("position:Q", **axis),
                y2="position_end:Q",
                color=diverging("mean:Q", -largest, largest),
            )
            .properties(width=WIDTH, height=240)
        )
        title = f"Mean reward by position and step: {run.name}"
        description = (
            f"Heat map of the mean reward of {run.name} over optimizer steps (across) and "
            "positions in the completion (up). The colours end at the 99% quantile."
        )
        figures.append(
            Figure(f"heatmap-{number}", title, description, chart, found, TOOLTIP, height=300)
        )
    return figures


def diverging(field: str, low: float, high: float) -> altair.Color:
    """Returns colours around a neutral 0, with 0 and both ends in the legend."""
    largest = max(abs(low), abs(high)) or 1.0
    scale = altair.Scale(
        scheme="purpleorange", domain=[-largest, largest], clamp=True, reverse=True
    )
    marked = sorted({low, 0.0, high})
    legend = altair.Legend(gradientLength=150, values=marked, format=".3~r")
    return altair.Color(field, title=None, scale=scale, legend=legend)


def _cells(run: RecordedRun) -> Iterator[JsonObject]:
    table = run.rewards.positions
    steps = table["step"].to_numpy()
    width = max(1, -(-int(steps.max(initial=1)) // STEPS))
    blocks = table.drop_columns("step").append_column("step", [(steps - 1) // width * width + 1])
    ends = dict(zip(POSITION_STARTS[:-1].tolist(), POSITION_STARTS[1:].tolist(), strict=True))
    for row in totals(blocks, ["step", "position"]).to_pylist():
        yield {
            "step": row["step"],
            "step_end": row["step"] + width,
            "position": row["position"],
            "position_end": ends.get(row["position"], 2 * row["position"]),
            "mean": rounded(row["reward_sum"] * UNIT / row["count"]),
            "low": rounded(row["reward_min"]),
            "high": rounded(row["reward_max"]),
            "tokens": row["count"],
        }
