"""The sampler beside the student: its metrics, the warning, the correction."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from poweropd.config import Config
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import UsageError
from poweropd.rollouts.base import Sampling
from poweropd.training.trainer import Trainer

MAKES = Callable[..., Config]
DIFFERENCE, SIZE = "sampler/mean_abs_difference", "sampler/effective_sample_size"


class Reporting:
    """The run's own engine, with other log-probs reported: by `change` of each completion's."""

    def __init__(self, engine: Any, change: Callable[[list[float]], list[float]]) -> None:
        self.engine, self.change = engine, change

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        for rollout in self.engine.generate(requests, sampling):
            changed = self.change(rollout.sampling_log_probs)
            yield replace(rollout, sampling_log_probs=changed)

    def sync(self) -> None:
        self.engine.sync()


def trainer_of(
    config: Config, change: Callable[[list[float]], list[float]] = lambda x: x
) -> Trainer:
    trainer = Trainer(config, progress=False)
    trainer.engine = Reporting(trainer.engine, change)
    return trainer


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"objective.kind": "full_vocab"},
        {"objective.stop": "canonical"},
        {"objective.stop": "semantic", "objective.baseline": "value"},
        {"rollout.score": "truncated", "rollout.top_k": 10, "rollout.top_p": 0.9},
        {"rollout.score": "truncated", "rollout.top_k": 10, "objective.kind": "full_vocab"},
        {"rollout.temperature": 0.7, "objective.select": {"name": "dial"}},
    ],
)
def test_an_exact_sampler_differs_by_nothing(recipe: MAKES, overrides: dict[str, Any]) -> None:
    """Whatever is scored and trained: log-probs are compared at temperature 1, untruncated."""
    row = trainer_of(recipe(**overrides)).step(0)
    assert row[DIFFERENCE] < 1e-4
    assert SIZE not in row
    assert ("objective.select" in overrides) == (row["select/fraction"] < 1)


def test_a_sampler_that_differs_is_warned_of_and_corrected(
    recipe: MAKES, caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe(**{"rollout.correction": "truncated"})
    row = trainer_of(config, lambda own: [x + 0.5 * (-1) ** i for i, x in enumerate(own)]).step(0)
    assert row[DIFFERENCE] == pytest.approx(0.5, abs=1e-3)
    assert 0.5 < row[SIZE] < 0.95
    assert "differ from the student's by 0.500 on average" in caplog.text


def test_the_correction_weights_the_gradient(recipe: MAKES) -> None:
    """A sampler half as likely to draw each token counts twice; a tenth as likely, twice too."""
    gradients = {}
    for factor in (1.0, 2.0, 10.0):
        config = recipe(**{"rollout.correction": "truncated"})
        shift = torch.tensor(factor).log().item()
        trainer = trainer_of(config, lambda own, shift=shift: [x - shift for x in own])
        examples = trainer.scored(trainer.sample(0))
        num_tokens = sum(e.num_tokens for e in examples)
        trainer.updater.accumulate(examples, trainer.reward, num_tokens)
        parameters = trainer.student.trained_weights().values()
        gradients[factor] = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(gradients[2.0], 2 * gradients[1.0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(gradients[10.0], 2 * gradients[1.0], rtol=1e-3, atol=1e-7)


def test_an_engine_may_give_no_log_probs_unless_they_are_needed(
    recipe: MAKES, tmp_path: Path
) -> None:
    assert DIFFERENCE not in trainer_of(recipe(), lambda own: []).step(0)
    config = recipe(**{"rollout.correction": "truncated", "run.dir": str(tmp_path / "other")})
    with pytest.raises(UsageError, match=r"set rollout\.correction=none"):
        trainer_of(config, lambda own: []).step(0)
