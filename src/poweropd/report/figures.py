"""The demo's picture."""

from collections.abc import Sequence
from pathlib import Path

import altair

from poweropd.report.theme import CONFIG, png, run_colour
from poweropd.runs.files import JsonObject, write_atomically

WIDTH, HEIGHT = 230, 200


def save_demo(points: Sequence[JsonObject], steps: Sequence[JsonObject], path: Path) -> None:
    """Draws the demo's picture: accuracy, gradient SNR and reward extremes over steps, by reward.

    `points`: step, reward, seed, accuracy, gradient_snr. `steps`: step, reward, seed, lowest.
    Thin lines are seeds, thick lines their means.
    """
    charts = [
        _over_steps(points, "accuracy", "accuracy", altair.Scale(zero=False)),
        _over_steps(points, "gradient_snr", "gradient signal-to-noise", altair.Scale(zero=True)),
        _over_steps(steps, "lowest", "lowest reward of a step", altair.Scale(type="symlog")),
    ]
    chart = altair.hconcat(*charts).resolve_scale(color="shared")
    write_atomically(path, png(chart.to_dict() | {"config": CONFIG}))


def _over_steps(
    rows: Sequence[JsonObject], field: str, title: str, scale: altair.Scale
) -> altair.LayerChart:
    named = [{**row, "run": row["reward"]} for row in rows]
    names = list(dict.fromkeys(row["reward"] for row in rows))
    base = altair.Chart(altair.Data(values=named)).encode(
        x=altair.X("step:Q", title="optimizer step"), color=run_colour(names, "reward")
    )
    seeds = base.mark_line(opacity=0.35, strokeWidth=1).encode(
        y=altair.Y(f"{field}:Q", title=title, scale=scale), detail="seed:N"
    )
    means = base.mark_line(strokeWidth=2.5).encode(y=altair.Y(f"mean({field}):Q", title=title))
    return altair.layer(seeds, means).properties(width=WIDTH, height=HEIGHT)
