"""Token selection: how many and which tokens are kept, and what that must not depend on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollout_cases import make_rollout

from poweropd import rewards
from poweropd.config import Config
from poweropd.data.batch import Batch, collate
from poweropd.data.rollout import Example
from poweropd.objectives import SELECTIONS
from poweropd.objectives.sampled import Sampled
from poweropd.objectives.scoring import TokenScores
from poweropd.objectives.selection import Dial, Random, Selected, Teachable
from poweropd.training.trainer import Trainer

MAKES = Callable[..., Config]


@dataclass
class Known:
    """Scores that are known; whatever is not given must not be asked for."""

    log_probs: tuple[torch.Tensor, torch.Tensor] | None = None
    compared: SimpleNamespace | None = None

    def comparison(self, top_k: int) -> SimpleNamespace:
        assert self.compared is not None
        return self.compared


def example(index: int, length: int) -> Example:
    ids = torch.arange(length)
    rollout = make_rollout(index, [1, 2], ids.tolist(), stopped=False)
    return Example(rollout, ids, ids, ids)


def kept_by_completion(batch: Batch, tokens: torch.Tensor) -> dict[int, list[int]]:
    rows = batch.completion_index[tokens].tolist()
    positions = batch.positions[tokens].tolist()
    return {row: [p for r, p in zip(rows, positions, strict=True) if r == row] for row in rows}


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.sampled_from([0.01, 0.07, 0.4, 0.5, 0.9, 1.0]),
    st.integers(0, 10),
)
def test_the_highest_scores_of_each_completion_are_kept(
    lengths: list[int], keep: float, seed: int
) -> None:
    batch = collate([example(i, n) for i, n in enumerate(lengths)])
    generator = torch.Generator().manual_seed(seed)
    teacher, student = -torch.rand(2, sum(lengths), generator=generator)
    selection = Dial(keep, beta=1.0)
    tokens = selection.choose(batch, Known((teacher, student)))
    assert tokens.tolist() == sorted(set(tokens.tolist()))
    scores = (teacher.exp() - student.exp()).abs()
    for row, n in enumerate(lengths):
        own = scores[batch.completion_index == row]
        kept = scores[tokens[batch.completion_index[tokens] == row]]
        expected = math.ceil(round(keep * n, 6))
        assert sorted(kept.tolist()) == sorted(own.tolist())[-expected:]
    assert Selected(Sampled(), selection).num_tokens(lengths) == len(tokens)
    assert Sampled().num_tokens(lengths) == sum(lengths)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_dial_scores(beta: float) -> None:
    t, p = torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0.25, 0.3, 0.1])
    scores = Dial(0.4, beta).scores(collate([]), Known((t.log(), p.log())))
    expected = (t.log() - p.log()).abs() ** (1 - beta) * (t - p).abs() ** beta
    torch.testing.assert_close(scores, expected)


def test_impossible_tokens_have_finite_scores() -> None:
    t = torch.tensor([-torch.inf, -torch.inf, -torch.inf, -1.0])
    p = torch.tensor([-torch.inf, -1.0, -1000.0, -1.0])
    for beta in (0.0, 0.5, 1.0):
        scores = Dial(0.4, beta).scores(collate([]), Known((t, p)))
        assert scores.isfinite().all()
        assert scores[1] == scores.max()
        assert scores[0] == scores[3] == 0


def test_a_random_choice_belongs_to_the_completion() -> None:
    examples = [example(i, 10 + i) for i in range(6)]
    selection = Random(0.4)
    whole = collate(examples)
    chosen = kept_by_completion(whole, selection.choose(whole, Known()))
    for order in ([5, 0, 3], [2], [4, 1]):
        batch = collate([examples[i] for i in order])
        found = kept_by_completion(batch, selection.choose(batch, Known()))
        assert found == {row: chosen[i] for row, i in enumerate(order)}
    assert len({tuple(positions[:4]) for positions in chosen.values()}) > 1


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_recipe_names_its_selection_and_the_parameters_of_that(recipe: MAKES, name: str) -> None:
    config = recipe(**{"objective.select": {"name": name, "keep": 0.3}})
    objective = Trainer(config, progress=False).updater.objective
    assert isinstance(objective, Selected)
    expected = {"dial": Dial(0.3, 1.0), "random": Random(0.3), "teachable": Teachable(0.3, 16)}
    assert objective.selection == expected[name]


def test_an_empty_batch_keeps_nothing() -> None:
    empty = torch.empty(0)
    known = Known((empty, empty), SimpleNamespace(forward_kl=empty, teacher_mass=empty))
    for selection in (Dial(0.4, 1.0), Random(0.4), Teachable(0.4, 16)):
        assert len(selection.choose(collate([]), known)) == 0


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zscore": {"reward.name": "zscore"},
    "baseline": {"objective.baseline": "value"},
    "full_vocab": {"objective.kind": "full_vocab"},
    "semantic": {"objective.stop": "semantic"},
    "truncated": {"rollout.score": "truncated", "rollout.top_k": 20, "rollout.top_p": 0.9},
}


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_selected_update_does_not_depend_on_micro_batches(
    recipe: MAKES, variant: str, select: str
) -> None:
    overrides = {"objective.select": {"name": select}, "train.prompts_per_step": 12}
    trainer = Trainer(recipe(**overrides, **VARIANTS[variant]), progress=False)
    examples = trainer.scored(trainer.sample(0))
    expected = sum(math.ceil(0.4 * e.num_tokens - 1e-9) for e in examples)
    parameters = trainer.student.trained_weights().values()
    found = []
    for max_tokens, given_examples in ((10**6, examples), (60, examples[::-1])):
        trainer.updater.max_tokens = max_tokens
        _, record = trainer.updater.accumulate(given_examples, trainer.reward, expected)
        assert len(record.rewards) == expected
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()
    outcome = trainer.updater.update(examples, trainer.reward, 0)
    assert outcome is not None
    assert outcome.num_tokens == expected
    assert outcome.selected_fraction == expected / sum(e.num_tokens for e in examples)


class Seeing:
    """Keeps all tokens, and the log-probs of teacher and student by which it could choose."""

    def __init__(self) -> None:
        self.seen: Any = None

    def choose(self, batch: Batch, scores: TokenScores) -> torch.Tensor:
        self.seen = scores.log_probs
        return torch.arange(len(batch.positions))


def test_a_selection_sees_merged_stops_as_one(recipe: MAKES) -> None:
    trainer = Trainer(recipe(**{"objective.stop": "semantic"}), progress=False)
    batch = collate(trainer.scored(trainer.sample(0)))
    plain, selection = trainer.updater.objective, Seeing()
    batch = trainer.updater._prepared(batch)
    objective = Selected(plain, selection)
    _, record = trainer.student(batch, objective, trainer.reward, 1.0)
    teacher, student = selection.seen
    torch.testing.assert_close(student, record.student_log_probs)
    torch.testing.assert_close(teacher, record.teacher_log_probs)
    stops = torch.isin(batch.student.targets, plain.merged_ids)
    assert stops.any()


def test_selecting_is_training_on_the_kept_tokens_alone(recipe: MAKES) -> None:
    """The gradient is that of the plain objective on examples which hold only those tokens."""
    config = recipe(**{"objective.select": {"name": "dial", "keep": 0.3, "beta": 0.5}})
    trainer = Trainer(config, progress=False)
    examples = trainer.scored(trainer.sample(0))
    batch = collate(examples)
    loss, record = trainer.student(batch, trainer.updater.objective, trainer.reward, 1.0)
    with torch.no_grad():
        log_ratio = rewards.create("log_ratio")
        student = trainer.student(batch, Sampled(), log_ratio, 1.0)[1].student_log_probs
    teacher = batch.teacher_log_probs
    assert teacher is not None
    scores = ((teacher - student).abs() * (teacher.exp() - student.exp()).abs()).sqrt()
    kept = []
    for row, e in enumerate(examples):
        own = (batch.completion_index == row).nonzero().flatten()
        kept += own[scores[own].topk(math.ceil(0.3 * e.num_tokens)).indices].tolist()
    tokens = torch.tensor(sorted(kept))
    expected, _ = trainer.student(batch.select(tokens), Sampled(), trainer.reward, 1.0)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(record.positions, batch.positions[tokens].to(record.positions.dtype))
