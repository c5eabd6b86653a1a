"""Pictures, with Altair: the same charts serve pages and, through vl-convert, PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair

# Okabe and Ito's colours, told apart by most colour-blind readers.
COLOURS = ["#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000"]
WIDTH, HEIGHT = 230, 200


def save_demo(
    points: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], path: Path
) -> None:
    """The demo's picture: accuracy, gradient SNR and reward extremes over steps, by reward.

    `points`: step, reward, seed, accuracy, gradient_snr. `steps`: step, reward, seed, lowest.
    Thin lines are seeds, thick lines their means.
    """
    charts = [
        _over_steps(points, "accuracy", "accuracy", altair.Scale(zero=False)),
        _over_steps(points, "gradient_snr", "gradient signal-to-noise", altair.Scale(zero=True)),
        _over_steps(steps, "lowest", "lowest reward of a step", altair.Scale(type="symlog")),
    ]
    chart = altair.hconcat(*charts).resolve_scale(color="shared").configure(background="white")
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(_png(chart))
    temporary.replace(path)


def _over_steps(
    rows: Sequence[dict[str, Any]], field: str, title: str, scale: altair.Scale
) -> altair.LayerChart:
    names = list(dict.fromkeys(row["reward"] for row in rows))
    base = altair.Chart(altair.Data(values=list(rows))).encode(
        x=altair.X("step:Q", title="optimizer step"),
        color=altair.Color(
            "reward:N",
            title="reward",
            sort=names,
            scale=altair.Scale(domain=names, range=COLOURS),
            legend=altair.Legend(symbolOpacity=1, symbolStrokeWidth=3),
        ),
    )
    seeds = base.mark_line(opacity=0.35, strokeWidth=1).encode(
        y=altair.Y(f"{field}:Q", title=title, scale=scale), detail="seed:N"
    )
    means = base.mark_line(strokeWidth=2.5).encode(y=altair.Y(f"mean({field}):Q", title=title))
    return altair.layer(seeds, means).properties(width=WIDTH, height=HEIGHT)


def _png(chart: altair.HConcatChart) -> bytes:
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(chart.to_json(), scale=2))
