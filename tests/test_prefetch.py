"""Rollouts ahead of the update lose nothing when a run fails or is cut in another way."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_rollouts_engines import AHEAD, Copied, metrics

from poweropd import Config, Trainer
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import RunError
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.prefetch import Ahead

MAKES = Callable[..., Config]
STALE = {**AHEAD, "rollout.staleness": 3, "train.steps": 5, "train.prompts_per_step": 2}


class Failing(Copied):
    """Fails once, at the `at`-th call; the 5th is the 5th step's, beside the update of the 2nd."""

    at, calls = 5, 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        Failing.calls += 1
        if Failing.calls == self.at:
            raise RunError("the engine is away")
        return super().generate(requests, sampling)


def test_a_failure_in_scoring_keeps_every_step_that_was_sampled(
    recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(recipe(**STALE), progress=False).train()
    config = recipe(**STALE, **{"run.dir": str(tmp_path / "failed"), "checkpoint.every": 100})
    trainer = Trainer(config, progress=False)
    trainer.train(until=2)

    def away() -> list[Any]:
        raise RunError("no teacher")

    monkeypatch.setattr(trainer.teacher, "collect", away)
    with pytest.raises(RunError, match="no teacher"):
        trainer.train()
    found = Trainer(config, progress=False)
    assert sorted(found.rollouts.ready) == [2, 3, 4]
    found.train()
    assert metrics(tmp_path / "failed") == metrics(tmp_path / "run")


def test_a_failure_beside_an_update_keeps_that_update(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "calls", 0)
    own = {"rollout.engine": f"{__name__}:Failing", "checkpoint.every": 100}
    config = recipe(**{**STALE, **own})
    with pytest.raises(RunError, match="the engine is away"):
        Trainer(config, progress=False).train()
    before = metrics(Path(config.run.dir))
    assert [row["step"] for row in before] == [1, 2]
    trainer = Trainer(config, progress=False)
    assert sorted(trainer.rollouts.ready) == [2, 3]  # not the 5th step, which failed
    trainer.train()
    after = metrics(Path(config.run.dir))
    assert [row["step"] for row in after] == [1, 2, 3, 4, 5]
    assert after[:2] == before


def test_a_step_that_one_process_lacks_is_sampled_again(recipe: MAKES) -> None:
    trainer = Trainer(recipe(**{"train.prompts_per_step": 2}), progress=False)
    ahead = Ahead(trainer.sample, steps=9, staleness=2)
    ahead.take(0)
    ahead.begin(0)
    ahead.finish()
    rows = ahead.pending()
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    again = Ahead(trainer.sample, steps=9, staleness=2)
    again.restore(rows[:-1], trainer.requests)
    assert again.ready == {1: ahead.ready[1]}
    again.restore(rows, trainer.requests)
    assert again.ready == ahead.ready
