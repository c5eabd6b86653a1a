"""Figures of the reward records: how rewards are distributed, where, and for how long."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import altair
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from poweropd.records.bins import (
    NUM_POSITIONS,
    NUM_VALUES,
    POSITION_STARTS,
    VALUE_EDGES,
    ZERO_BIN,
    quantile,
    value_ends,
)
from poweropd.records.statistics import STEPS_PER_BLOCK
from poweropd.report.curves import Row, hovering, overlay
from poweropd.report.runs import Run
from poweropd.report.theme import Figure

EARLY = 16  # positions that count as early
FAR = 4.0  # a log ratio beyond this is extreme: the ratio is 55
TAIL = 0.01  # the quantile that stands for "low" and "high"
Counts = NDArray[np.int64]
SYMLOG = altair.Scale(type="symlog", constant=0.01)
POSITION_AXIS = altair.X(
    "position:Q", title="position in the completion", scale=altair.Scale(type="symlog", constant=8)
)


def counts(run: Run, quantity: str) -> Counts:
    """[positions, values] tokens in each cell, over all steps."""
    table = run.rewards.histogram
    table = table.filter(pc.equal(table["quantity"], quantity))
    rows_ = np.searchsorted(POSITION_STARTS, table["position"].to_numpy())
    cells = np.zeros((NUM_POSITIONS, NUM_VALUES), dtype=np.int64)
    np.add.at(cells, (rows_, table["value_bin"].to_numpy()), table["count"].to_numpy())
    return cells


def distributions(runs: Sequence[Run]) -> list[Figure]:
    """Histogram of rewards, and how many log ratios lie beyond a value, to either side."""
    return [
        *_figure(
            runs, _reward_rows, "reward-distribution", "Distribution of token rewards",
            "Share of all tokens whose reward lies in a bin, on a log scale. Bins are four to the "
            "octave, so they widen with the reward; the middle one holds what is nearer to 0 than "
            "2^-14.",
            altair.X("value:Q", title="reward", scale=SYMLOG), "step-after",
        ),
        *_figure(
            runs, lambda run: _tail_rows(run, -1), "tail-below",
            "Tokens the teacher finds far less likely",
            "Share of tokens whose log ratio, ln t - ln p, is at or below minus x, both on log "
            "scales.",
            altair.X("value:Q", title="x, nats", scale=altair.Scale(type="log")), "linear",
        ),
        *_figure(
            runs, lambda run: _tail_rows(run, 1), "tail-above",
            "Tokens the teacher finds far more likely",
            "Share of tokens whose log ratio, ln t - ln p, is at or above x, both on log scales.",
            altair.X("value:Q", title="x, nats", scale=altair.Scale(type="log")), "linear",
        ),
    ]  # fmt: skip


def _figure(
    runs: Sequence[Run],
    make: Callable[[Run], Iterator[Row]],
    key: str,
    title: str,
    description: str,
    x: altair.X,
    interpolate: Any,
) -> list[Figure]:
    found = [row for run in runs for row in make(run)]
    if not found:
        return []
    line = overlay([run.name for run in runs]).mark_line(interpolate=interpolate, strokeWidth=1.8)
    share = altair.Y("share:Q", title="share of tokens", scale=altair.Scale(type="log"))
    line = line.encode(x=x, y=share)
    chart = hovering([line], line, ["run:N", "value:Q", "share:Q"])
    return [Figure(key, title, description, chart, found, by_run=True)]


def _reward_rows(run: Run) -> Iterator[Row]:
    """From the lowest to the highest bin that is not empty; an empty one between has no share."""
    cells = counts(run, "reward").sum(0)
    filled = cells.nonzero()[0]
    lows = value_ends()[0]
    for place in range(filled.min(), filled.max() + 1) if len(filled) else []:
        share = float(f"{cells[place] / cells.sum():.4g}") or None
        yield {"run": run.name, "value": float(f"{lows[place]:.4g}"), "share": share}


def _tail_rows(run: Run, side: int) -> Iterator[Row]:
    """Share of tokens at or beyond each bin edge from 2^-4 on."""
    cells = counts(run, "log_ratio").sum(0)[::side]
    beyond = np.cumsum(cells[::-1])[::-1]  # [V] tokens in this bin or further out
    for edge, number in zip(VALUE_EDGES[ZERO_BIN:], beyond[ZERO_BIN + 1 :], strict=True):
        if edge >= 2**-4 and number:
            share = float(f"{number / cells.sum():.4g}")
            yield {"run": run.name, "value": float(f"{edge:.4g}"), "share": share}


def by_position(runs: Sequence[Run]) -> list[Figure]:
    """Extremes, entropies and top-1 shares over the position in the completion."""
    lowest, low = "Lowest reward and 1% quantile by position", "The lowest reward"
    highest, high = "Highest reward and 99% quantile by position", "The highest reward"
    ends = "at each position over all steps; four bins to the octave after position 32."
    return [
        *_kinds(runs, lambda run: _extremes(run, "min", TAIL), "lowest-by-position", lowest,
                f"{low} (dashed) and its 1% quantile (solid) {ends}"),
        *_kinds(runs, lambda run: _extremes(run, "max", 1 - TAIL), "highest-by-position", highest,
                f"{high} (dashed) and its 99% quantile (solid) {ends}"),
        *_kinds(runs, _entropies, "entropy-by-position", "Entropy by position, nats",
                f"Mean entropy of the student's (solid) and, where known, the teacher's (dashed) "
                f"next token {ends}", SCALES["linear"]),
        *_kinds(runs, _agreement, "top1-by-position", "Top-1 agreement by position",
                f"Share of tokens that are the most likely one to both models (solid), and to the "
                f"student (dashed), {ends}", SCALES["linear"]),
    ]  # fmt: skip


SCALES = {"linear": altair.Scale(zero=False), "symlog": SYMLOG}


def _kinds(
    runs: Sequence[Run],
    make: Callable[[Run], Iterator[Row]],
    key: str,
    title: str,
    description: str,
    scale: altair.Scale = SYMLOG,
    x: altair.X = POSITION_AXIS,
) -> list[Figure]:
    """Two lines a run, told apart by dashes."""
    found = [row for run in runs for row in make(run) if np.isfinite(row["value"])]
    if not found:
        return []
    kinds = list(dict.fromkeys(row["kind"] for row in found))
    dashes = altair.Scale(domain=kinds, range=[[1, 0], [4, 3]][: len(kinds)])
    line = overlay([run.name for run in runs]).mark_line(strokeWidth=1.8)
    line = line.encode(
        x=x,
        y=altair.Y("value:Q", title=None, scale=scale),
        strokeDash=altair.StrokeDash("kind:N", title=None, scale=dashes, sort=kinds),
    )
    chart = hovering([line], line, ["run:N", "kind:N", x.shorthand, "value:Q"])
    rounded = [{**row, "value": float(f"{row['value']:.4g}")} for row in found]
    return [Figure(key, title, description, chart, rounded, by_run=True)]


def _totals(run: Run) -> list[dict[str, Any]]:
    """Of each position bin over all steps."""
    table = run.rewards.positions
    ways = [
        (name, name[-3:] if name.endswith(("_min", "_max")) else "sum")
        for name in table.column_names
        if name not in ("step", "position")
    ]
    grouped = table.group_by("position").aggregate(ways).sort_by("position").to_pylist()
    named = {f"{name}_{way}": name for name, way in ways} | {"position": "position"}
    return [{named[key]: value for key, value in row.items()} for row in grouped]


def _extremes(run: Run, end: str, q: float) -> Iterator[Row]:
    cells = dict(zip(POSITION_STARTS.tolist(), counts(run, "reward"), strict=True))
    for row in _totals(run):
        base = {"run": run.name, "position": row["position"]}
        yield {**base, "kind": f"{q:.0%} quantile", "value": quantile(cells[row["position"]], q)}
        yield {**base, "kind": "extreme", "value": row[f"reward_{end}"]}


def _entropies(run: Run) -> Iterator[Row]:
    for row in _totals(run):
        base = {"run": run.name, "position": row["position"]}
        yield {**base, "kind": "student", "value": row["entropy_sum"] * 2.0**-30 / row["count"]}
        if row["teacher_count"]:
            mean = row["teacher_entropy_sum"] * 2.0**-30 / row["teacher_count"]
            yield {**base, "kind": "teacher", "value": mean}


def _agreement(run: Run) -> Iterator[Row]:
    for row in _totals(run):
        base = {"run": run.name, "position": row["position"]}
        if row["teacher_count"]:
            yield {**base, "kind": "both", "value": row["both_top1"] / row["teacher_count"]}
        yield {**base, "kind": "student", "value": row["top1"] / row["count"]}


def persistence(runs: Sequence[Run]) -> list[Figure]:
    """Whether extremes decay as training goes on."""
    step = altair.X("step:Q", title="optimizer step")
    return [
        *_kinds(runs, _far, "far-over-training", f"Tokens with a log ratio beyond {FAR:g}",
                f"Share of tokens with |ln t - ln p| of at least {FAR:g}, at the first {EARLY} "
                "positions (solid) and later (dashed), over training.",
                altair.Scale(type="symlog", constant=1e-4), step),
        *_kinds(runs, _lowest, "lowest-over-training", "Lowest reward over training",
                f"The lowest reward of all tokens at the first {EARLY} positions (solid) and later "
                "(dashed), over training.", SYMLOG, step),
    ]  # fmt: skip


def _groups(steps: NDArray[Any], most: int = 60) -> NDArray[Any]:
    """The first step of the bucket of each step: at most `most`, of whole histogram blocks."""
    blocks = -(-(steps.max(initial=1) // STEPS_PER_BLOCK + 1) // most)
    width = blocks * STEPS_PER_BLOCK
    return (steps - 1) // width * width + 1


def _far(run: Run) -> Iterator[Row]:
    table = run.rewards.histogram
    table = table.filter(pc.equal(table["quantity"], "log_ratio"))
    buckets = _groups(table["step"].to_numpy())
    early = table["position"].to_numpy() < EARLY
    low, high = value_ends()
    bins, number = table["value_bin"].to_numpy(), table["count"].to_numpy()
    far = (low[bins] >= FAR) | (high[bins] <= -FAR)
    for name, where in _early_and_later(early):
        for bucket in np.unique(buckets[where]):
            own = where & (buckets == bucket)
            share = number[own & far].sum() / number[own].sum()
            yield {"run": run.name, "kind": name, "step": int(bucket), "value": float(share)}


def _lowest(run: Run) -> Iterator[Row]:
    table = run.rewards.positions
    buckets = _groups(table["step"].to_numpy())
    early, values = table["position"].to_numpy() < EARLY, table["reward_min"].to_numpy()
    for name, where in _early_and_later(early):
        for bucket in np.unique(buckets[where]):
            lowest = values[where & (buckets == bucket)].min()
            yield {"run": run.name, "kind": name, "step": int(bucket), "value": float(lowest)}


def _early_and_later(early: NDArray[np.bool_]) -> list[tuple[str, NDArray[np.bool_]]]:
    return [(f"positions 0-{EARLY - 1}", early), ("later positions", ~early)]
