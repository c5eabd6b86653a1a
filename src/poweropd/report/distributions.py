"""Figures of the reward records: how rewards are distributed, where, and for how long."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from poweropd.report.curves import hovering, overlay
from poweropd.report.runs import RecordedRun
from poweropd.report.theme import (
    FINE,
    LEGEND_HEIGHT,
    PAGE_HEIGHT,
    TEXT,
    Figure,
    TooltipField,
    narrowing,
    position_axis,
    rounded,
    signed_axis,
)
from poweropd.runs.bins import (
    FAR,
    NUM_POSITIONS,
    NUM_VALUES,
    POSITION_STARTS,
    VALUE_EDGES,
    ZERO_BIN,
    quantile,
    value_ends,
)
from poweropd.runs.files import JsonObject
from poweropd.runs.statistics import STEPS_PER_BLOCK, UNIT, totals

EARLY = 16  # positions that count as early
TAIL = 0.01  # the quantile that stands for "low" and "high"
POINTS = 60  # at most, of a curve over training
Counts = NDArray[np.int64]
Values = Sequence[float]
RunRows = Callable[[RecordedRun], Iterator[JsonObject]]


def _scaled(**options: Any) -> Callable[[Values, str | None, Values], dict[str, Any]]:
    return lambda values, title, bounds: {"title": title, "scale": altair.Scale(**options)}


#: Kind of axis -> how it is drawn, from all values on it, its title and the bounds of rewards.
AXES: dict[str, Callable[[Values, str | None, Values], dict[str, Any]]] = {
    "signed": signed_axis,
    "fine": functools.partial(signed_axis, linear=FINE),
    "linear": _scaled(zero=False),
    "zero": _scaled(zero=True),
    "log": _scaled(type="log", nice=False),
    "position": position_axis,
}
WIDEST, THINNEST = 7.0, 1.8


@dataclass(frozen=True)
class Plot:
    """One figure of lines. A run's rows have `x`, `value` and, for two lines a run, `kind`."""

    key: str
    title: str
    description: str
    rows: RunRows
    x: str
    x_axis: tuple[str, str]  # kind of AXES, title
    y_axis: tuple[str, str | None] = ("signed", None)
    interpolate: Any = "linear"
    coincide: bool = False  # whether lines of several runs may be the same

    def figures(self, runs: Sequence[RecordedRun], bounds: Values) -> list[Figure]:
        """Draws the figure; there is none if no run has anything to draw."""
        found = [row for run in runs for row in self.rows(run)]
        if not found:
            return []
        axes = {}
        for field, (kind, title) in ((self.x, self.x_axis), ("value", self.y_axis)):
            numbers = [row[field] for row in found if row[field] is not None]
            axes[field] = AXES[kind](numbers, title, bounds)
        line = overlay(runs).mark_line(interpolate=self.interpolate, strokeWidth=THINNEST)
        line = line.encode(
            x=altair.X(f"{self.x}:Q", **axes[self.x]), y=altair.Y("value:Q", **axes["value"])
        )
        kinds = list(dict.fromkeys(row["kind"] for row in found if "kind" in row))
        if kinds:
            dashes = altair.Scale(domain=kinds, range=[[1, 0], [4, 3]][: len(kinds)])
            legend = altair.Legend(orient="bottom", symbolType="stroke", symbolStrokeColor=TEXT)
            dash = altair.StrokeDash("kind:N", title=None, scale=dashes, sort=kinds, legend=legend)
            line = line.encode(strokeDash=dash)
        layers = [line]
        if self.coincide:
            layers = narrowing(line, [run.name for run in runs], WIDEST, THINNEST)
        return [
            Figure(
                key=self.key,
                title=self.title,
                description=self.description,
                chart=hovering(layers, line),
                rows=found,
                tooltip=self.tooltip(kinds),
                by_run=True,
                height=PAGE_HEIGHT + (LEGEND_HEIGHT if kinds else 0),
            )
        ]

    def tooltip(self, kinds: Sequence[str]) -> list[TooltipField]:
        """Returns what a person needs of a row: the run, which line, and the point."""
        (_, across), (_, up) = self.x_axis, self.y_axis
        which = [TooltipField("kind", "", "text")] if kinds else []
        points = [TooltipField(self.x, across or self.x), TooltipField("value", up or "value")]
        return [TooltipField("run", "run", "text"), *which, *points]


def figures(runs: Sequence[RecordedRun], bounds: Values, plots: Sequence[Plot]) -> list[Figure]:
    """Draws the plots for which any of the runs has something to draw.

    `bounds`: those of the runs' rewards, at which axes of rewards have ticks.
    """
    return [figure for plot in plots for figure in plot.figures(runs, bounds)]


def counts(run: RecordedRun, quantity: str) -> Counts:
    """Returns the [positions, values] tokens in each cell, over all steps."""
    table = run.rewards.histogram
    table = table.filter(pc.equal(table["quantity"], quantity))
    places = np.searchsorted(POSITION_STARTS, table["position"].to_numpy())
    cells = np.zeros((NUM_POSITIONS, NUM_VALUES), dtype=np.int64)
    np.add.at(cells, (places, table["value_bin"].to_numpy()), table["count"].to_numpy())
    return cells


def _reward_rows(run: RecordedRun) -> Iterator[JsonObject]:
    """Yields the bins from the lowest to the highest filled one; an empty one has no share."""
    cells = counts(run, "reward").sum(0)
    filled = cells.nonzero()[0]
    lows = value_ends()[0]
    for place in range(filled.min(), filled.max() + 1) if len(filled) else []:
        share = rounded(cells[place] / cells.sum()) or None
        yield {"run": run.name, "reward": rounded(lows[place]), "value": share}


def _tail(side: int) -> RunRows:
    """Returns rows of the share of tokens beyond each bin edge from 2^-4 on.

    With side -1 it is the share below minus the edge.
    """

    def rows(run: RecordedRun) -> Iterator[JsonObject]:
        cells = counts(run, "log_ratio").sum(0)[::side]
        beyond = np.cumsum(cells[::-1])[::-1]  # [V] tokens in this bin or further out
        for edge, number in zip(VALUE_EDGES[ZERO_BIN:], beyond[ZERO_BIN + 1 :], strict=True):
            if edge >= 2**-4 and number:
                share = rounded(number / cells.sum())
                yield {"run": run.name, "x": rounded(edge), "value": share}

    return rows


def _by_position(values: Callable[[JsonObject, Counts], dict[str, float]]) -> RunRows:
    """Returns rows of kind -> value at each position.

    `values` makes them of the position's statistics over all steps and its [V] counts of rewards.
    """

    def rows(run: RecordedRun) -> Iterator[JsonObject]:
        cells = dict(zip(POSITION_STARTS.tolist(), counts(run, "reward"), strict=True))
        table = totals(run.rewards.positions.drop_columns("step"), ["position"])
        for row in table.to_pylist():
            base = {"run": run.name, "position": row["position"]}
            for kind, value in values(row, cells[row["position"]]).items():
                yield {**base, "kind": kind, "value": rounded(value)}

    return rows


def _extremes(end: str, q: float) -> RunRows:
    return _by_position(
        lambda row, rewards: {
            f"{q:.0%} quantile": quantile(rewards, q),
            "extreme": row[f"reward_{end}"],
        }
    )


def _entropies(row: JsonObject, rewards: Counts) -> dict[str, float]:
    found = {"student": row["entropy_sum"] * UNIT / row["count"]}
    if row["teacher_count"]:
        found["teacher"] = row["teacher_entropy_sum"] * UNIT / row["teacher_count"]
    return found


def _agreement(row: JsonObject, rewards: Counts) -> dict[str, float]:
    both = {"both": row["both_top1"] / row["teacher_count"]} if row["teacher_count"] else {}
    return both | {"student": row["top1"] / row["count"]}


def _buckets(steps: Counts) -> Counts:
    """Returns the first step of each step's bucket; at most POINTS buckets, of whole blocks."""
    blocks = -(-int(steps.max(initial=1)) // (STEPS_PER_BLOCK * POINTS))
    width = blocks * STEPS_PER_BLOCK
    return (steps - 1) // width * width + 1


def _early_and_later(
    run: RecordedRun, table: pa.Table, of: Callable[[NDArray[np.bool_]], float]
) -> Iterator[JsonObject]:
    """Yields what `of` makes of a table's early and later positions, in each bucket of steps."""
    buckets, early = _buckets(table["step"].to_numpy()), table["position"].to_numpy() < EARLY
    for kind, where in ((f"positions 0-{EARLY - 1}", early), ("later positions", ~early)):
        for bucket in np.unique(buckets[where]).tolist():
            value = rounded(of(where & (buckets == bucket)))
            yield {"run": run.name, "kind": kind, "step": bucket, "value": value}


def _far(run: RecordedRun) -> Iterator[JsonObject]:
    table = run.rewards.histogram
    table = table.filter(pc.equal(table["quantity"], "log_ratio"))
    low, high = value_ends()
    bins, number = table["value_bin"].to_numpy(), table["count"].to_numpy()
    far = number * ((low[bins] >= FAR) | (high[bins] <= -FAR))
    return _early_and_later(run, table, lambda own: far[own].sum() / number[own].sum())


def _lowest(run: RecordedRun) -> Iterator[JsonObject]:
    table = run.rewards.positions
    lowest = table["reward_min"].to_numpy()
    return _early_and_later(run, table, lambda own: lowest[own].min())


_POSITION = ("position", "position in the completion")
_STEP, _SHARE = ("linear", "optimizer step"), ("log", "share of tokens")
_EVERYWHERE = "at each position over all steps; four bins to the octave from position 32."
DISTRIBUTIONS = [
    Plot(
        "reward-distribution", "Distribution of token rewards",
        "Share of all tokens whose reward lies in a bin, on a log scale. Bins are four to the "
        "octave, so they widen with the reward; the middle one holds what is nearer to 0 than "
        "2^-14.",
        _reward_rows, "reward", ("fine", "reward"), _SHARE, "step-after",
    ),
    Plot(
        "tail-below", "Tokens the teacher finds far less likely",
        "Share of tokens whose log ratio, ln t - ln p, is below minus x, both on log scales.",
        _tail(-1), "x", ("log", "x, nats"), _SHARE,
    ),
    Plot(
        "tail-above", "Tokens the teacher finds far more likely",
        "Share of tokens whose log ratio, ln t - ln p, is at least x, both on log scales.",
        _tail(1), "x", ("log", "x, nats"), _SHARE,
    ),
]  # fmt: skip
BY_POSITION = [
    Plot(
        "lowest-by-position", "Lowest reward and 1% quantile by position",
        f"The lowest reward (dashed) and its 1% quantile (solid) {_EVERYWHERE}",
        _extremes("min", TAIL), "position", _POSITION,
    ),
    Plot(
        "highest-by-position", "Highest reward and 99% quantile by position",
        f"The highest reward (dashed) and its 99% quantile (solid) {_EVERYWHERE}",
        _extremes("max", 1 - TAIL), "position", _POSITION,
    ),
    Plot(
        "entropy-by-position", "Entropy by position, nats",
        "Mean entropy of the student's (solid) and, where known, the teacher's (dashed) next token "
        f"{_EVERYWHERE}",
        _by_position(_entropies), "position", _POSITION, ("zero", None),
    ),
    Plot(
        "top1-by-position", "Top-1 agreement by position",
        "Share of tokens that are the most likely one to both models (solid), and to the student "
        f"(dashed), {_EVERYWHERE}",
        _by_position(_agreement), "position", _POSITION, ("linear", None),
    ),
]  # fmt: skip
PERSISTENCE = [
    Plot(
        "far-over-training", f"Tokens with a log ratio beyond {FAR:g}",
        f"Share of tokens with |ln t - ln p| of at least {FAR:g}, at the first {EARLY} positions "
        "(solid) and later (dashed), over training.",
        _far, "step", _STEP, ("zero", None),
    ),
    Plot(
        "lowest-over-training", "Lowest reward over training",
        f"The lowest reward of all tokens at the first {EARLY} positions (solid) and later "
        "(dashed), over training. Of lines that coincide, the first run's are the widest.",
        _lowest, "step", _STEP, coincide=True,
    ),
]  # fmt: skip
