"""The colours of rewards and the axes of figures: what a reader can tell apart and read off."""

import math
from itertools import combinations
from typing import Any

import pytest

from poweropd import rewards
from poweropd.report import planes, theme
from poweropd.report.colours import (
    OWN_COLOUR,
    POWER_COLOURS,
    REWARD_COLOURS,
    line_styles,
    luminance,
    reward_colour,
)

ALPHAS = [0.1, 0.5, 1, 5, 10, 50, 100, 500]


def test_every_reward_has_one_colour_that_can_be_seen_on_white() -> None:
    assert {*REWARD_COLOURS} | {"power"} == {*rewards.REWARDS}
    colours = [*REWARD_COLOURS.values(), *POWER_COLOURS, OWN_COLOUR]
    assert len(set(colours)) == len(colours)
    assert all(1.05 / (luminance(colour) + 0.05) >= 3 for colour in colours)
    assert [reward_colour({"name": "power", "alpha": a}) for a in ALPHAS] == [*POWER_COLOURS]
    assert all(luminance(a) > luminance(b) for a, b in combinations(POWER_COLOURS[3:], 2))


def test_a_colour_does_not_depend_on_the_other_runs() -> None:
    power, clip = {"name": "power", "alpha": 500.0}, {"name": "clip", "low": -5.0}
    for settings in ([power, clip], [clip, power], [clip, {"name": "log_ratio"}, power]):
        found = dict(zip((s["name"] for s in settings), line_styles(settings), strict=True))
        assert found["power"].colour == POWER_COLOURS[-1]
        assert found["clip"].colour == REWARD_COLOURS["clip"]


def test_runs_of_one_reward_are_told_apart_by_shade_and_dashes() -> None:
    for setting in ({"name": "power", "alpha": 500.0}, {"name": "log_ratio"}):
        styles = line_styles([setting] * 4)
        assert len({style.colour for style in styles}) == 4
        assert len({style.border for style in styles}) == 4


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, POWER_COLOURS[3]),
        ({"name": "power", "alpha": {"schedule": "linear", "start": 1, "end": 100}}, "#4338A8"),
        ({"name": "power", "alpha": "much"}, POWER_COLOURS[3]),
        ({"name": "power", "alpha": 1e300}, POWER_COLOURS[-1]),
        ({"name": "power", "alpha": -1}, POWER_COLOURS[3]),
        ({"name": "mine:reward"}, OWN_COLOUR),
        ({"name": ["no", "name"]}, OWN_COLOUR),
    ],
)
def test_any_setting_has_a_colour(setting: dict[str, Any], expected: str) -> None:
    assert reward_colour(setting) == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"name": "log_ratio"}, (-math.inf, math.inf)),
        ({"name": "clip", "low": -5.0}, (-5, 1)),
        ({"name": "tanh"}, (-1, 1)),
        ({"name": "power", "alpha": 500.0}, (-1, 1)),
        ({"name": "power", "alpha": 0.5, "scale": "box_cox"}, (-2, 2)),
        ({"name": "hellinger"}, (-2, 10)),
        ({"name": "gate"}, (0, 1)),
    ],
)
def test_bounds_come_from_the_reward(
    setting: dict[str, Any], expected: tuple[float, float]
) -> None:
    assert planes.reward_bounds(rewards.create(**setting)) == pytest.approx(expected)


def test_bounds_of_runs_leave_out_what_is_unbounded_or_unknown() -> None:
    names = ("log_ratio", "zscore", "power", "hellinger", "os:system")
    assert planes.bounds_of([{"name": name} for name in names] + [{}]) == [1, -1, -2, 10]


def test_axes_of_rewards_have_ticks_at_zero_and_at_the_bounds() -> None:
    far = theme.signed_axis([-16.2, -0.3, 7.9], None, [-1, 1])
    assert {-10, -1, 0, 1} <= {*far["axis"].values}
    near = theme.signed_axis([-0.7, -0.2], None, [-1, 1])
    assert near["scale"].domain == [-1, 0]
    assert {-1, 0} <= {*near["axis"].values}
    mean = theme.reward_axis([0.21, 0.72], None, [-1, 1])
    assert mean["scale"].domain == [0, 1]
    assert {0, 0.2, 0.4, 1} <= {*mean["axis"].values}
    small = theme.reward_axis([0.01, 0.02], None, [-1, 1])  # a bound out of sight has no tick
    assert small["scale"].domain == [0, 0.02]
    assert theme.reward_axis([0.0], None, [])["scale"].domain == [0, 1]
