"""How every figure looks on a page and as a PNG file: there is one theme and one way to draw."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair

from poweropd.report.colours import LineStyle

WIDTH, HEIGHT = 370, 220  # of a figure's data area in a PNG file
PAGE_HEIGHT, LEGEND_HEIGHT = 270, 36  # of a whole figure on the page, whose width is its column's
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
SMALLEST_GAP = 0.07  # of an axis between two labels
DECADES = [
    sign * base * 10.0**k for base in (1, 3) for k in (0, 1, -1, 2, -2, 3) for sign in (1, -1)
]
FINE, COARSE = 0.01, 0.3  # below it, a signed axis is linear


@dataclass(frozen=True)
class TooltipField:
    """A field of a row as the tooltip shows it: its title, and "number", "percent" or "text"."""

    field: str
    title: str
    kind: str = "number"


@dataclass(frozen=True)
class Figure:
    """A chart with its data apart from it, since altair would check every number of the data."""

    key: str  # file name and id
    title: str
    description: str  # what is drawn: the caption, also for readers who cannot see the figure
    chart: Any  # an altair chart of the named data "rows"
    rows: Sequence[Mapping[str, Any]]
    tooltip: Sequence[TooltipField] = ()
    by_run: bool = False  # whether each run has its own lines, in colours that the page explains
    smooth: bool = False  # whether the page's slider smooths its lines
    height: int = PAGE_HEIGHT

    def spec(self) -> dict[str, Any]:
        """Returns the Vega-Lite specification, with the data."""
        return {
            **self.chart.to_dict(validate=True),
            "config": CONFIG,
            "datasets": {"rows": list(self.rows)},
            "autosize": {"type": "pad", "contains": "padding"},
        }

    def page_spec(self) -> dict[str, Any]:
        """Returns the specification of a figure as wide as its column, with its tooltip's fields.

        Its height is fixed whatever it shows, so that a page that is loaded again does not jump.
        """
        size = {"width": "container", "height": self.height}
        fields = [[one.field, one.title, one.kind] for one in self.tooltip]
        fit = {"autosize": {"type": "fit", "contains": "padding"}, "padding": 4}
        return {**self.spec(), **size, **fit, "usermeta": {"tooltip": fields}}

    def png(self) -> bytes:
        """Draws the figure, with its title, as a PNG file."""
        return png(self.spec() | {"title": self.title})


def named_rows() -> altair.NamedData:
    """Returns the data of a figure, by its name."""
    return altair.NamedData(name="rows")


def whole_row() -> altair.TooltipContent:
    """Returns the tooltip of a mark: its row, of which the page shows the figure's fields.

    Vega-Lite 6.4 loses the names of single fields on a nearest point.
    """
    return altair.TooltipContent("data")


def run_colour(names: Sequence[str], colours: Sequence[str], title: str = "run") -> altair.Color:
    """Returns the colour of each run or reward, the same in all figures."""
    scale = altair.Scale(domain=list(names), range=list(colours))
    return altair.Color("run:N", title=title, sort=list(names), scale=scale)


def run_dash(names: Sequence[str], styles: Sequence[LineStyle]) -> altair.StrokeDash:
    """Returns the dashes of each run, which tell runs of one reward apart."""
    scale = altair.Scale(domain=list(names), range=[list(style.dash) for style in styles])
    return altair.StrokeDash("run:N", title="run", sort=list(names), scale=scale)


def narrowing(
    line: altair.Chart, names: Sequence[str], widest: float, thinnest: float
) -> list[altair.Chart]:
    """Returns the lines of each run, narrower from run to run: of equal lines, all can be seen."""
    step = (widest - thinnest) / max(1, len(names) - 1)
    found = []
    for number, name in enumerate(names):
        own = line.transform_filter(altair.FieldEqualPredicate(field="run", equal=name))
        own.mark = altair.MarkDef(type="line", strokeWidth=round(widest - step * number, 2))
        found.append(own)
    return found


def signed_axis(
    values: Sequence[float],
    title: str | None = None,
    bounds: Sequence[float] = (),
    linear: float = COARSE,
) -> dict[str, Any]:
    """Returns the axis of values of either sign and any magnitude, such as rewards.

    It has ticks at 0 and at the `bounds` that the values come near, then at 1 and 3 of a decade
    where there is room; Vega itself would leave out any of them. `linear`: where it is nearly so.
    """

    def place(value: float) -> float:
        return math.copysign(math.log1p(abs(value) / linear), value)

    low, high = _reaching(values, bounds)
    scale = altair.Scale(type="symlog", constant=linear, nice=False, domain=[low, high])
    ticks = _spread([0.0, *bounds, *DECADES], low, high, place)
    return {"title": title, "scale": scale, "axis": _exact_axis(ticks)}


def reward_axis(
    values: Sequence[float], title: str | None = None, bounds: Sequence[float] = ()
) -> dict[str, Any]:
    """Returns a linear axis with ticks at 0, at the bounds in sight and at round numbers."""
    low, high = _reaching(values, bounds)
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9) / 2))
    step *= 1 if (high - low) / step <= 8 else 2 if (high - low) / step <= 12 else 5
    round_ones = [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
    ticks = _spread([0.0, *bounds, *round_ones], low, high, float)
    scale = altair.Scale(nice=False, domain=[low, high])
    return {"title": title, "scale": scale, "axis": _exact_axis(ticks)}


def _reaching(values: Sequence[float], bounds: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of an axis: it holds 0, and a bound if the values come half-way to it."""
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    low = min([low, *(b for b in bounds if b < 0 and low <= b / 2)])
    high = max([high, *(b for b in bounds if b > 0 and high >= b / 2)])
    return low, high if high > low else low + 1.0


def _spread(
    wanted: Sequence[float], low: float, high: float, place: Callable[[float], float]
) -> list[float]:
    """Returns those of the wanted ticks, the important ones first, whose labels have room."""
    length, found = place(high) - place(low), list[float]()
    for tick in wanted:
        apart = all(abs(place(tick) - place(t)) >= SMALLEST_GAP * length for t in found)
        if low <= tick <= high and apart:
            found.append(round(tick, 9))
    return sorted(found)


def _exact_axis(ticks: Sequence[float]) -> altair.Axis:
    return altair.Axis(values=list(ticks), format="~g", labelOverlap=False)


def position_axis(
    values: Sequence[float], title: str | None = None, bounds: Sequence[float] = ()
) -> dict[str, Any]:
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
