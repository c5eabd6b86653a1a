"""Schedules of the rollout: completions' length and temperature as functions of the step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poweropd import Config, Trainer
from poweropd.config.fields import ScheduleConfig
from poweropd.config.rollouts import RolloutConfig
from poweropd.data.rollout import Rollout
from poweropd.errors import UsageError
from poweropd.evaluation.settings import DivergenceSettings
from poweropd.plan.estimate import Workload
from poweropd.training.build import RunInputs
from poweropd.training.validation import _divergence_settings

MAKES = Callable[..., Config]
GROWING = {"schedule": "linear", "start": 2, "end": 12, "steps": 2}
COOLING = {"schedule": "cosine", "start": 2.0, "end": 0.0, "steps": 2}


def rows(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    clocks = ("seconds/", "tokens_per_second", "memory/")
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in found]


def sampled(trainer: Trainer, step: int) -> list[Rollout]:
    return sorted(trainer.sample(step), key=lambda rollout: rollout.key)


@pytest.mark.thorough
def test_a_step_is_as_long_as_its_schedule_says(recipe: MAKES, tmp_path: Path) -> None:
    config = recipe(**{"rollout.max_new_tokens": GROWING, "train.steps": 4})
    trainer = Trainer(config, progress=False)
    assert [max(len(r.completion_ids) for r in sampled(trainer, s)) for s in range(4)] == [
        *(2, 7, 12, 12)
    ]
    trainer.train()
    assert [row["rollout/max_new_tokens"] for row in rows(config)] == [2, 7, 12, 12]
    assert "rollout/temperature" not in rows(config)[0]
    parts = config.model_copy(update={"run": type(config.run)(dir=str(tmp_path / "parts"))})
    for until in (2, None):
        Trainer(parts, progress=False).train(until=until)
    assert rows(parts) == rows(config)


def test_a_step_is_sampled_at_its_temperature(recipe: MAKES, tmp_path: Path) -> None:
    config = recipe(**{"rollout.temperature": COOLING})
    trainer = Trainer(config, progress=False)
    for step, temperature in enumerate((2.0, 1.0, 0.0)):
        own = {"rollout.temperature": temperature, "run.dir": str(tmp_path / str(step))}
        assert sampled(Trainer(recipe(**own), progress=False), step) == sampled(trainer, step)
    trainer.train()
    assert [row["rollout/temperature"] for row in rows(config)] == [2.0, 1.0, 0.0]


def test_a_constant_schedule_is_the_number(recipe: MAKES, tmp_path: Path) -> None:
    tokens = {"schedule": "constant", "start": 12}
    other = recipe(**{"rollout.max_new_tokens": tokens, "run.dir": str(tmp_path / "other")})
    found = []
    for config in (recipe(), other):
        Trainer(config, progress=False).train()
        found.append(rows(config))
    assert [row.pop("rollout/max_new_tokens") for row in found[1]] == [12, 12, 12]
    assert found[0] == found[1]


def test_what_needs_the_longest_completion_takes_that_of_the_schedule(recipe: MAKES) -> None:
    long = {"schedule": "linear", "start": 1000, "end": 10, "steps": 2}
    with pytest.raises(UsageError, match=r"rollout.max_new_tokens=1000 exceed the student's"):
        RunInputs.load(recipe(**{"rollout.max_new_tokens": long}))
    config = recipe(**{"rollout.max_new_tokens": GROWING, "data.holdout": 4, "train.steps": 4})
    assert Workload.of(config, 10.0, None) == Workload(4, 10, 8, 12)  # (2 + 7 + 12 + 12) / 4
    assert Workload.of(config, 10.0, 100.0) == Workload(4, 10, 12, 12)
    assert config.evaluate is not None
    expected = DivergenceSettings(max_new_tokens=12, seed=42)
    assert _divergence_settings(config, config.evaluate) == expected


@settings(max_examples=60)
@given(
    st.sampled_from(["linear", "cosine"]),
    *(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 300)),
)
def test_lengths_are_whole_and_move_one_way(name: str, start: int, end: int, steps: int) -> None:
    schedule = ScheduleConfig(schedule=name, start=start, end=end, steps=steps)
    section = RolloutConfig(max_new_tokens=schedule)
    found = [section.max_new_tokens_at(step) for step in range(steps + 2)]
    assert found in (sorted(found), sorted(found, reverse=True))
    assert (found[0], found[-1], found[-2]) == (start, end, end)
    assert section.longest == max(found)
    assert {type(tokens) for tokens in found} == {int}


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (
            {"max_new_tokens": {**GROWING, "start": 0}},
            "max_new_tokens.start: expected at least 1, got 0",
        ),
        ({"max_new_tokens": {**GROWING, "schedule": "lin"}}, "expected 'constant', 'linear' or 'c"),
        ({"temperature": {"schedule": "linear", "start": 1}}, "temperature.end: a linear schedule"),
        ({"temperature": {**COOLING, "schedule": "constant"}}, "end: a constant schedule has none"),
        ({"temperature": {**COOLING, "end": -1}}, "temperature.end: expected greater than or equ"),
        ({"temperature": {"schedul": 1}}, r"temperature.schedul: unknown key \(known: schedule, "),
        ({"temperature": -1}, "rollout.temperature: expected greater than or equal to 0, got -1"),
        (
            {"temperature": COOLING, "score": "truncated", "top_k": 5},
            "rollout.temperature: a schedule needs rollout.score=full",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(
    recipe: MAKES, rollout: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(rollout=rollout)
