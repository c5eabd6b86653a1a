"""Figures with two axes: mean reward over position and step, and the reward itself over (t, p)."""

import json
from collections.abc import Iterator, Sequence

import altair
import numpy as np
import torch

from poweropd import rewards
from poweropd.report.runs import RecordedRun
from poweropd.report.theme import WIDTH, Figure, named_rows, position_axis, rounded
from poweropd.runs.bins import POSITION_STARTS
from poweropd.runs.files import JsonObject
from poweropd.runs.statistics import UNIT, totals

STEPS = 40  # columns of a heatmap, at most
GRID = 40  # probabilities along each axis of the plane


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
            .mark_rect()
            .encode(
                x=altair.X("step:Q", title="optimizer step", scale=altair.Scale(nice=False)),
                x2="step_end:Q",
                y=altair.Y("position:Q", **axis),
                y2="position_end:Q",
                color=_diverging("mean:Q", largest),
                tooltip=["step:Q", "position:Q", "mean:Q", "low:Q", "high:Q", "tokens:Q"],
            )
            .properties(width=WIDTH, height=240)
        )
        title = f"Mean reward by position and step: {run.name}"
        description = (
            f"Heat map of the mean reward of {run.name} over optimizer steps (across) and "
            "positions in the completion (up). The colours end at the 99% quantile."
        )
        figures.append(Figure(f"heatmap-{number}", title, description, chart, found))
    return figures


def _diverging(field: str, largest: float) -> altair.Color:
    scale = altair.Scale(
        scheme="purpleorange", domain=[-largest, largest], clamp=True, reverse=True
    )
    return altair.Color(field, title=None, scale=scale, legend=altair.Legend(gradientLength=150))


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


def plane(runs: Sequence[RecordedRun]) -> tuple[list[Figure], list[str]]:
    """Returns figures of the runs' rewards over (t, p), and notes on those that cannot be drawn."""
    settings: dict[str, list[RecordedRun]] = {}
    for run in runs:
        text = json.dumps(run.recipe.get("reward", {}), sort_keys=True, default=str)
        settings.setdefault(text, []).append(run)
    figures, notes = [], []
    for number, same in enumerate(settings.values(), 1):
        given = same[0].recipe.get("reward") or {}
        if not isinstance(given, dict) or rewards.names_code(given):
            # To open somebody's run must not execute what it names.
            notes.append(f"the reward of {same[0].name} is not drawn: it is code of the user's own")
            continue
        try:
            reward = rewards.create(**given).at(max(0, same[0].steps - 1)).unstandardized
        except (ValueError, TypeError, RuntimeError) as error:
            notes.append(f"the reward of {same[0].name} is not drawn: {error}")
            continue
        figures.append(_plane_figure(number, reward, given, [run.name for run in same]))
    return figures, notes


def _plane_figure(
    number: int, reward: rewards.Reward, given: JsonObject, names: list[str]
) -> Figure:
    grid = torch.linspace(1 / GRID, 1, GRID, dtype=torch.float64) - 0.5 / GRID
    values = reward(grid.log()[:, None], grid.log()[None, :])  # [t, p]
    found = [
        {"t": t, "p": p, "reward": rounded(value), "half": 0.5 / GRID}
        for t, line in zip(grid.tolist(), values.tolist(), strict=True)
        for p, value in zip(grid.tolist(), line, strict=True)
    ]
    chart = (
        altair.Chart(named_rows())
        .transform_calculate(
            t0="datum.t - datum.half", t1="datum.t + datum.half",
            p0="datum.p - datum.half", p1="datum.p + datum.half",
        )
        .mark_rect()
        .encode(
            x=altair.X("p0:Q", title="student's probability p", scale=altair.Scale(domain=[0, 1])),
            x2="p1:Q",
            y=altair.Y("t0:Q", title="teacher's probability t", scale=altair.Scale(domain=[0, 1])),
            y2="t1:Q",
            color=_diverging("reward:Q", values.abs().max().item() or 1.0),
            tooltip=["t:Q", "p:Q", "reward:Q"],
        )
        .properties(width=240, height=240)
    )  # fmt: skip
    parameters = ", ".join(f"{k} {v}" for k, v in given.items() if k != "name")
    shown = f"{given.get('name', 'power')}{f' ({parameters})' if parameters else ''}"
    base = "; of z-scores, the base reward" if given.get("name") == "zscore" else ""
    return Figure(
        key=f"plane-{number}",
        title=f"Reward over (t, p): {shown}",
        description=f"The reward {shown} for every pair of probabilities of a token, as it was at "
        f"the last step of {', '.join(names)}{base}.",
        chart=chart,
        rows=found,
    )
