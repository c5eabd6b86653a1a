"""The reward itself, over the probabilities that teacher and student give a token, and its bounds.

To open somebody's run must not execute what it names: a reward of the user's own is not made.
"""

import json
import math
from collections.abc import Sequence

import altair
import torch

from poweropd import rewards
from poweropd.report.colours import Setting
from poweropd.report.heatmaps import diverging
from poweropd.report.runs import RecordedRun
from poweropd.report.theme import WIDTH, Figure, TooltipField, named_rows, rounded, whole_row
from poweropd.runs.files import JsonObject

GRID = 40  # cells along each axis of the plane
DECADES = 4  # of 1 - p that the axes show: up to a probability of 0.9999
LABELS = ["0", *(f"0.{'9' * k}" for k in range(1, DECADES + 1))]
SEAMLESS = 0.53  # of a cell to either side of its middle, so that cells leave no seams
LAST_STEP = 10**9  # at which schedules are over
DEEPEST = 4  # log-probabilities are probed to -10^4, and at minus infinity


def reward_function(setting: Setting, step: int) -> rewards.Reward:
    """Returns a reward as it is at an optimizer step from 0; of z-scores, the base reward.

    Raises ValueError, saying why, if it is code of the user's own or cannot be made.
    """
    if not setting or rewards.names_code(setting):
        raise ValueError("it is code of the user's own" if setting else "it is not in config.yaml")
    try:
        reward = rewards.create(**dict(setting)).at(step).unstandardized  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from None
    if reward.needs_reference:
        raise ValueError("it depends on a third probability, a reference model's")
    return reward


def reward_bounds(reward: rewards.Reward) -> tuple[float, float]:
    """Returns the lowest and the highest reward of any two probabilities, infinite if unbounded."""
    depths = torch.cat([torch.zeros(1), torch.logspace(-6, DEEPEST, 101)]).double()
    log_probs = torch.cat([-depths, torch.full((1,), -math.inf, dtype=torch.float64)])
    values = reward(log_probs[:, None], log_probs[None, :])
    low, high = values.min().item(), values.max().item()
    return float(f"{low:.6g}"), float(f"{high:.6g}")


def bounds_of(settings: Sequence[Setting]) -> list[float]:
    """Returns the finite bounds of rewards; the z-score of a bounded reward has none."""
    found = set[float]()
    for setting in settings:
        if setting.get("name") == "zscore":
            continue
        try:
            found |= {*reward_bounds(reward_function(setting, LAST_STEP))}
        except ValueError:  # the reward's own figure says why
            continue
    return sorted(
        (b for b in found if b and math.isfinite(b)), key=lambda bound: (abs(bound), -bound)
    )


def plane(runs: Sequence[RecordedRun]) -> tuple[list[Figure], list[str]]:
    """Returns figures of the runs' rewards over (t, p), and notes on those that cannot be drawn."""
    settings: dict[str, list[RecordedRun]] = {}
    for run in runs:
        text = json.dumps(run.reward_setting, sort_keys=True, default=str)
        settings.setdefault(text, []).append(run)
    figures, notes = [], []
    for number, same in enumerate(settings.values(), 1):
        try:
            reward = reward_function(same[0].reward_setting, max(0, same[0].steps - 1))
        except ValueError as error:
            notes.append(f"the reward of {same[0].name} is not drawn: {error}")
            continue
        figures.append(_plane_figure(number, reward, same))
    return figures, notes


def _plane_figure(number: int, reward: rewards.Reward, same: Sequence[RecordedRun]) -> Figure:
    found = _plane_rows(reward)
    low, high = reward_bounds(reward)
    ends = "The colours end at the bounds of the reward."
    if not (math.isfinite(low) and math.isfinite(high)):
        largest = max(abs(row["reward"] or 0.0) for row in found)
        low, high = max(low, -largest), min(high, largest)
        ends = "The reward is unbounded; its colours end at the largest value drawn here."
    axes = {
        field: {
            "title": f"{who}'s probability {name}",
            "scale": altair.Scale(domain=[0, DECADES], nice=False),
            "axis": altair.Axis(
                values=list(range(DECADES + 1)),
                labelExpr=f"{json.dumps(LABELS)}[datum.value]",
                labelOverlap=False,
            ),
        }
        for field, who, name in (("p0", "student", "p"), ("t0", "teacher", "t"))
    }
    half = SEAMLESS * DECADES / GRID
    depths = {name: f"(-log(1 - datum.{name}) / LN10)" for name in "tp"}
    corners = {
        f"{name}{end}": f"{depths[name]} {sign} {half}"
        for name in "tp"
        for end, sign in (("0", "-"), ("1", "+"))
    }
    chart = (
        altair.Chart(named_rows())
        .transform_calculate(**corners)
        .mark_rect(tooltip=whole_row())
        .encode(
            x=altair.X("p0:Q", **axes["p0"]),
            x2="p1:Q",
            y=altair.Y("t0:Q", **axes["t0"]),
            y2="t1:Q",
            color=diverging("reward:Q", low, high),
        )
        .properties(width=WIDTH, height=300)
    )
    given = same[0].reward_setting
    parameters = ", ".join(f"{k} {v}" for k, v in given.items() if k != "name")
    shown = f"{given.get('name', 'power')}{f' ({parameters})' if parameters else ''}"
    base = "; of z-scores, the base reward" if given.get("name") == "zscore" else ""
    names = ", ".join(run.name for run in same)
    return Figure(
        key=f"plane-{number}",
        title=f"Reward over (t, p): {shown}",
        description=f"The reward {shown} for the probabilities t and p of a token, as it was at "
        f"the last step of {names}{base}. Both axes are those of -log(1 - p): most of a trained "
        f"model's tokens have probabilities near 1. {ends}",
        chart=chart,
        rows=found,
        tooltip=[TooltipField("reward", "reward"), *(TooltipField(x, x, "text") for x in "tp")],
        height=360,
    )


def _plane_rows(reward: rewards.Reward) -> list[JsonObject]:
    """Returns the reward in the middle of each cell."""
    left = 10.0 ** -((torch.arange(GRID, dtype=torch.float64) + 0.5) * DECADES / GRID)  # 1 - p
    log_probs = torch.log1p(-left)
    values = reward(log_probs[:, None], log_probs[None, :])  # [t, p]
    probs = [float(f"{1 - x:.8f}") for x in left.tolist()]
    return [
        {"t": t, "p": p, "reward": rounded(value)}
        for t, line in zip(probs, values.tolist(), strict=True)
        for p, value in zip(probs, line, strict=True)
    ]
