"""The demo's picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair

from poweropd.report.colours import Setting, reward_colour
from poweropd.report.theme import CONFIG, narrowing, png, run_colour, signed_axis
from poweropd.runs.files import JsonObject, write_atomically

WIDTH, HEIGHT = 230, 200
MEAN_STEPS = 10  # of the thick line of a metric that is known at every step
THICKEST, THINNEST = 6.0, 2.0


def save_demo(
    points: Sequence[JsonObject],
    steps: Sequence[JsonObject],
    settings: Mapping[str, Setting],
    bounds: Sequence[float],
    path: Path,
) -> None:
    """Draws the demo's picture: accuracy, gradient SNR and reward extremes over steps, by reward.

    `points`: step, reward, seed, accuracy, gradient_snr. `steps`: step, reward, seed, lowest.
    `settings`: reward -> its parameters. `bounds`: of the bounded ones. Thin lines are seeds. Thick
    ones are means of the seeds, of the lowest reward also of 10 steps; where thick lines coincide,
    the first reward's is the widest.
    """
    lowest = signed_axis([row["lowest"] for row in steps], "lowest reward of a step", bounds)
    charts = [
        _over_steps(points, "accuracy", settings, _from_data("accuracy"), 1),
        _over_steps(points, "gradient_snr", settings, _from_data("gradient signal-to-noise"), 1),
        _over_steps(steps, "lowest", settings, lowest, MEAN_STEPS),
    ]
    chart = altair.hconcat(*charts).resolve_scale(color="shared")
    write_atomically(path, png(chart.to_dict() | {"config": CONFIG}))


def _from_data(title: str) -> dict[str, Any]:
    return {"title": title, "scale": altair.Scale(zero=False)}


def _over_steps(
    rows: Sequence[JsonObject],
    field: str,
    settings: Mapping[str, Setting],
    axis: dict[str, Any],
    every: int,
) -> altair.LayerChart:
    names = list(settings)
    colour = run_colour(names, [reward_colour(one) for one in settings.values()], "reward")
    y = altair.Y(f"{field}:Q", **axis)
    x = altair.X("step:Q", title="optimizer step")
    named = [{**row, "run": row["reward"]} for row in rows]
    seeds, means = (
        altair.Chart(altair.Data(values=found)).encode(x=x, y=y, color=colour)
        for found in (named, _means(rows, field, names, every))
    )
    thin = seeds.mark_line(opacity=0.35, strokeWidth=1).encode(detail="seed:N")
    thick = narrowing(means.mark_line(), names, THICKEST, THINNEST)
    return altair.layer(thin, *thick).properties(width=WIDTH, height=HEIGHT)


def _means(
    rows: Sequence[JsonObject], field: str, names: Sequence[str], every: int
) -> list[JsonObject]:
    """Returns the mean over seeds and each `every` steps, at the mean of these steps."""
    groups: dict[tuple[str, int], list[JsonObject]] = {}
    for row in sorted(rows, key=lambda row: (names.index(row["reward"]), row["step"])):
        groups.setdefault((row["reward"], -(-row["step"] // every)), []).append(row)
    return [
        {"run": reward, **{k: statistics.fmean(row[k] for row in group) for k in ("step", field)}}
        for (reward, _), group in groups.items()
    ]
