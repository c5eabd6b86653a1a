"""The colour of each reward, the same in every figure and on every page.

Rewards that are made of the log ratio have warm colours. Powers have cold ones that grow darker
with alpha. All of them have a contrast of 3 or more on white (`tests/test_report_colours.py`).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poweropd.rewards import Power

Setting = Mapping[str, object]  # of a reward, as a recipe has it

REWARD_COLOURS = {
    "log_ratio": "#CC3311",
    "clip": "#B07D00",
    "tanh": "#D6497F",
    "zscore": "#8E3B8E",
    "hellinger": "#6B7A1E",
    "tsallis": "#8A5A00",
    "proximal": "#E0562B",
    "jensen_shannon": "#A8324F",
    "sign": "#C43BC4",
    "trust": "#9A4B2F",
    "extrapolate": "#7A6A00",
    "gate": "#6E6E6E",
    "suppress": "#4A4A4A",
}
#: Of the power reward, from alpha 0.1 on: two for each decade, so that the paper's eight alphas
#: (0.1, 0.5, 1, 5, 10, 50, 100, 500) have one each.
POWER_COLOURS = (
    *("#3F9B6E", "#1F9C8C", "#1793A8", "#0E86C8", "#2F6FD0", "#3F51C5", "#4338A8", "#2B1F78"),
)
OWN_COLOUR = "#000000"  # a reward of the user's own
#: Runs that share a colour are told apart: the first is drawn as it is, the others mixed with so
#: much black (or, if the colour is dark, white) and with these dashes.
SHADES = (0.0, 0.45, 0.2, 0.6)
DASHES = ((1, 0), (7, 3), (2, 2), (8, 3, 2, 3))
DARK = 0.06  # relative luminance


@dataclass(frozen=True)
class LineStyle:
    """How the lines of a run are drawn, and as which border the page's list of runs shows it."""

    colour: str
    dash: tuple[int, ...]

    @property
    def border(self) -> str:
        """Returns the style of a CSS border that looks like the dashes."""
        return ("solid", "dashed", "dotted", "double")[DASHES.index(self.dash)]


def reward_colour(setting: Setting) -> str:
    """Returns the colour of a reward; a power whose alpha moves has that of its last alpha."""
    name = setting.get("name", "power")
    if name != "power":
        return REWARD_COLOURS.get(str(name), OWN_COLOUR)
    alpha = setting.get("alpha", Power.alpha)
    if isinstance(alpha, Mapping):
        alpha = alpha.get("end", alpha.get("start"))
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        alpha = Power.alpha  # not a number: the run's own notes say so
    place = math.floor(2 * math.log10(alpha) + 1e-9) + 2
    return POWER_COLOURS[min(max(place, 0), len(POWER_COLOURS) - 1)]


def line_styles(settings: Sequence[Setting]) -> list[LineStyle]:
    """Returns the style of each run from its reward; runs of one colour get shades and dashes."""
    found, before = [], Counter[str]()
    for setting in settings:
        colour = reward_colour(setting)
        number = before[colour] % len(SHADES)
        before[colour] += 1
        found.append(LineStyle(_shade(colour, SHADES[number]), DASHES[number]))
    return found


def luminance(colour: str) -> float:
    """Returns the relative luminance of "#rrggbb" (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(v * w for v, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def _shade(colour: str, share: float) -> str:
    """Returns the colour mixed with black or, if it is dark itself, with white."""
    other = 255 if luminance(colour) < DARK else 0
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(v + (other - v) * share):02X}" for v in parts)
