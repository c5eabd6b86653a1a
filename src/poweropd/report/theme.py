"""How every figure looks on a page and as a PNG file: there is one theme and one way to draw."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair

# The colours of Okabe and Ito, which most colour-blind readers can tell apart. The light ones are
# darkened to a contrast of 3 on white, and the last two are our own.
COLOURS = [
    *("#D55E00", "#0072B2", "#008A65", "#B5608F", "#A87000", "#2E86B5", "#000000", "#7A4FBF"),
]
WIDTH, HEIGHT = 370, 220
TEXT, GRID = "#1a1a1a", "#e4e4e4"
CONFIG: dict[str, Any] = {
    "background": "white",
    "font": "sans-serif",
    "aria": False,  # the page labels a figure as a whole, not each of its thousand marks
    "axis": {
        **{"labelColor": TEXT, "titleColor": TEXT, "gridColor": GRID, "labelFontSize": 11},
        **{"titleFontSize": 12, "titleFontWeight": "normal", "labelOverlap": True},
    },
    "axisX": {"tickCount": 6},
    "legend": {
        **{"labelColor": TEXT, "titleColor": TEXT, "labelFontSize": 11, "titleFontSize": 12},
        **{"titleFontWeight": "normal", "symbolOpacity": 1, "symbolStrokeWidth": 3},
        **{"labelLimit": 240, "symbolType": "stroke"},
    },
    "title": {"color": TEXT, "fontSize": 13, "anchor": "start"},
    "view": {"stroke": "#bbbbbb"},
}


@dataclass(frozen=True)
class Figure:
    """A chart with its data apart from it, since altair would check every number of the data."""

    key: str  # file name and id
    title: str
    description: str  # what is drawn: the caption, also for readers who cannot see the figure
    chart: Any  # an altair chart of the named data "rows"
    rows: Sequence[Mapping[str, Any]]
    by_run: bool = False  # whether each run has its own lines, in colours that the page explains

    def spec(self) -> dict[str, Any]:
        """Returns the Vega-Lite specification, with the data."""
        return {
            **self.chart.to_dict(validate=True),
            "config": CONFIG,
            "datasets": {"rows": list(self.rows)},
            "autosize": {"type": "pad", "contains": "padding"},
        }

    def png(self) -> bytes:
        """Draws the figure, with its title, as a PNG file."""
        return png(self.spec() | {"title": self.title})


def named_rows() -> altair.NamedData:
    """Returns the data of a figure, by its name."""
    return altair.NamedData(name="rows")


def run_colour(names: Sequence[str], title: str = "run") -> altair.Color:
    """Returns the colour of each run or reward, the same in all figures."""
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    scale = altair.Scale(domain=list(names), range=colours)
    return altair.Color("run:N", title=title, sort=list(names), scale=scale)


def signed_axis(values: Sequence[float], title: str | None = None) -> dict[str, Any]:
    """Returns the axis of values of either sign and any magnitude; ticks at 1 and 3 of a decade.

    Vega itself places few ticks on such a scale. Values too close for three ticks get a linear one.
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    sizes = [base * 10.0**k for k in range(-2, 5) for base in (1, 3)]
    ticks = [t for t in [*(-s for s in reversed(sizes)), 0.0, *sizes] if low <= t <= high]
    if len(ticks) < 3:
        return {"title": title, "scale": altair.Scale(zero=False)}
    scale = altair.Scale(type="symlog", constant=0.01, nice=False, zero=False)
    return {"title": title, "scale": scale, "axis": altair.Axis(values=ticks, format="~g")}


def position_axis(values: Sequence[float], title: str | None = None) -> dict[str, Any]:
    """Returns the axis of completion positions: nearly linear at the start, then logarithmic."""
    ticks = [0, 4, 8, *(2**k for k in range(4, 21))]
    shown = [t for t in ticks if t <= max(values, default=0.0)]
    scale = altair.Scale(type="symlog", constant=8, nice=False)
    return {"title": title, "scale": scale, "axis": altair.Axis(values=shown)}


def png(spec: Mapping[str, Any]) -> bytes:
    """Draws a Vega-Lite specification as a PNG file."""
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(json.dumps(spec), scale=2))


def rounded(value: float, digits: int = 4) -> float | None:
    """Returns a number with so many significant digits, or None if it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
