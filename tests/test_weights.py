"""Token weights and the selection of learnable tokens, against their equations in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objectives import Pair
from test_selection import Known, example

from poweropd import rewards
from poweropd.config import Config
from poweropd.data.batch import collate
from poweropd.errors import UsageError
from poweropd.kernels import Head, compare_heads, linear_full_vocab
from poweropd.objectives.base import teacher_of
from poweropd.objectives.full_vocab import FullVocab
from poweropd.objectives.sampled import Sampled
from poweropd.objectives.scoring import TokenScores
from poweropd.objectives.selection import Dial, Selected, Teachable
from poweropd.objectives.weights import Drift
from poweropd.training.trainer import Trainer

MAKES = Callable[..., Config]
LOG_PROB = st.one_of(st.floats(-50, 0), st.just(-math.inf), st.floats(-1e-6, 0))


def drift(teacher: list[float], student: list[float], gamma: float) -> list[float]:
    """1 + gamma (1 - F), by the definition."""
    distances = [0.0 if t == p else abs(t - p) for t, p in zip(teacher, student, strict=True)]
    total = math.fsum(distances)
    shares = [math.fsum(distances[:k]) / total if total else 0.0 for k in range(len(distances))]
    return [1 + gamma * (1 - share) for share in shares]


def test_drift_weights_are_those_written_out() -> None:
    teacher, student = [-1.0, -0.5, -4.0, -2.0], [-1.0, -1.0, -1.0, -1.5]
    batch = collate([example(0, 4), example(1, 1)])
    known = Known((torch.tensor([*teacher, -1.0]), torch.tensor([*student, -3.0])))
    found = Drift(0.5).of(batch, known)
    # |d| is 0, 0.5, 3, 0.5 in the first completion, 4 in all.
    assert found.tolist() == pytest.approx([1.5, 1.5, 1.4375, 1.0625, 1.5])
    assert found.tolist()[:4] == pytest.approx(drift(teacher, student, 0.5))
    assert found.dtype == torch.float32


@given(
    st.lists(st.lists(st.tuples(LOG_PROB, st.floats(-50, 0)), min_size=1, max_size=9), min_size=1),
    st.sampled_from([0.1, 0.5, 3.0]),
)
@settings(max_examples=25)
def test_drift_weights_fall_within_a_completion_and_know_no_other(
    completions: list[list[tuple[float, float]]], gamma: float
) -> None:
    examples = [example(i, len(tokens)) for i, tokens in enumerate(completions)]
    columns = [torch.tensor(tokens).T for tokens in completions]
    whole = Drift(gamma).of(collate(examples), Known(tuple(torch.cat(columns, 1))))
    for part, own, tokens in zip(
        whole.split([len(tokens) for tokens in completions]), columns, completions, strict=True
    ):
        alone = Drift(gamma).of(collate([example(0, len(tokens))]), Known((own[0], own[1])))
        assert torch.equal(part, alone)
        assert part[0].item() == pytest.approx(1 + gamma)
        assert (part.diff() <= 0).all()
        assert part.min() >= 1
        if math.isfinite(sum(t for t, _ in tokens)):
            expected = drift(own[0].tolist(), own[1].tolist(), gamma)
            assert part.tolist() == pytest.approx(expected, rel=1e-5)


def test_nothing_has_no_weights() -> None:
    empty = torch.empty(0)
    assert Drift(0.5).of(collate([]), Known((empty, empty))).tolist() == []


@pytest.mark.parametrize("kind", [Sampled, FullVocab])
@pytest.mark.parametrize("selection", [None, Dial(0.5, 1.0)])
def test_a_weighted_gradient_is_the_weighted_sum_of_the_tokens(
    kind: type[Sampled] | type[FullVocab], selection: Dial | None
) -> None:
    """The drift is that of all trained tokens, also if a selection then leaves some out."""
    pair = Pair(torch.arange(9), task_reward=0.3)
    reward, plain = rewards.create("power", alpha=0.5), kind(pair.teacher_head)
    weighted = Selected(plain, selection, Drift(2.0))
    got = pair.gradient(weighted, pair.batch, pair.hidden, reward, 0.25)
    teacher, student = (log_probs.diagonal().tolist() for log_probs in pair.log_probs())
    weights = drift(teacher, student, 2.0)
    scores = TokenScores(pair.hidden, Head(pair.weight), pair.batch, pair.teacher_head, None)
    kept = torch.arange(9) if selection is None else selection.choose(pair.batch, scores)
    assert len(kept) == (9 if selection is None else 5)
    expected = torch.zeros_like(got)
    for token in kept:
        one = token[None]
        own = pair.gradient(plain, pair.batch.select(one), pair.hidden[one], reward)
        expected += 0.25 * weights[token] * own
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert weighted.num_tokens([9]) == len(kept)


def test_a_weighted_update_does_not_depend_on_micro_batches(recipe: MAKES) -> None:
    overrides = {"objective.weights": {"name": "drift"}, "objective.select": {"name": "teachable"}}
    trainer = Trainer(recipe(**overrides), progress=False)
    objective = trainer.updater.objective
    assert isinstance(objective, Selected)
    assert objective.weights == Drift(0.5)
    examples = trainer.scored(trainer.sample(0))
    parameters = trainer.student.trained_weights().values()
    found = []
    for max_tokens, given_examples in ((10**6, examples), (30, examples[::-1])):
        trainer.updater.max_tokens = max_tokens
        trainer.updater.accumulate(given_examples, trainer.reward, 20)
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()


def test_a_comparison_has_the_divergence_from_the_teacher_and_its_mass_on_likely_ids() -> None:
    pair = Pair(torch.arange(9), seed=3)
    teacher, student = pair.log_probs()
    for top_k in (1, 4, 500):
        found = compare_heads(
            pair.hidden,
            Head(pair.weight),
            pair.batch.student.targets,
            teacher_of(pair.batch, pair.teacher_head),
            top_k=top_k,
            chunk_size=4,
        )
        kl = (teacher.exp() * (teacher - student)).sum(1)
        mass = [
            sum(t[i].exp().item() for i in p.argsort(descending=True)[:top_k])
            for t, p in zip(teacher, student, strict=True)
        ]
        torch.testing.assert_close(found.forward_kl.double(), kl, rtol=1e-5, atol=1e-6)
        assert found.teacher_mass.tolist() == pytest.approx(mass, rel=1e-5)


def scaled(values: list[float]) -> list[float]:
    """Clipped to [0, 1] between the 5% and 95% quantiles, linear between order statistics."""
    ordered, ends = sorted(values), []
    for q in (0.05, 0.95):
        place = q * (len(values) - 1)
        below = ordered[int(place)]
        above = ordered[min(int(place) + 1, len(values) - 1)]
        ends.append(below + (place - int(place)) * (above - below))
    return [min(max((x - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0) for x in values]


def test_teachable_tokens_are_where_the_teacher_disagrees_within_reach() -> None:
    generator = torch.Generator().manual_seed(0)
    kl, mass = torch.rand(2, 12, generator=generator).double()
    batch = collate([example(0, 11), example(1, 1)])
    known = Known(compared=type("Compared", (), {"forward_kl": kl, "teacher_mass": mass}))
    found = Teachable(0.3, 16).scores(batch, known)
    expected = [
        a * b for a, b in zip(scaled(kl[:11].tolist()), scaled(mass[:11].tolist()), strict=True)
    ]
    assert found.tolist() == pytest.approx([*expected, 0.0])


def test_teachable_looks_at_contexts_and_not_at_the_sampled_tokens() -> None:
    """So over the tokens that a context may sample, the kept gradient is the exact one."""
    first, second = Pair(torch.arange(9)), Pair(torch.arange(9) + 20)
    scores = [
        Teachable(0.3, 8).scores(
            pair.batch,
            TokenScores(pair.hidden, Head(pair.weight), pair.batch, pair.teacher_head, None),
        )
        for pair in (first, second)
    ]
    assert torch.equal(*scores)
    assert scores[0].max() > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"select": {"name": "dial", "top_k": 4}}, "top_k: it belongs to teachable, and dial has"),
        ({"select": {"name": "teachable", "beta": 0.5}}, "beta: it belongs to dial, and teachable"),
        ({"weights": {"name": "drift", "gamma": 0}}, "objective.weights.gamma: .*greater than 0"),
        ({"weights": {"name": "sink"}}, "objective.weights.name: .*'drift'"),
    ],
)
def test_what_a_selection_or_weights_do_not_take_is_refused(
    recipe: MAKES, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(**{f"objective.{key}": value for key, value in overrides.items()})


def test_teachable_needs_a_teacher_in_this_process(recipe: MAKES) -> None:
    served = {"teacher.servers": ["http://127.0.0.1:1"]}
    with pytest.raises(
        UsageError, match=r"select\.name=teachable needs the teacher's hidden states"
    ):
        recipe(**{"objective.select": {"name": "teachable"}}, **served)


def generalised_kl(t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return (p * (p / t).log() - p + t).sum()


def half_squared_distance(t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return ((p - t) ** 2).sum() / 2


@pytest.mark.parametrize(
    ("reward", "divergence"),
    [(rewards.LogRatio(), generalised_kl), (rewards.Power(1.0), half_squared_distance)],
)
def test_sums_over_the_likely_ids_descend_on_a_divergence_that_rests_at_the_teacher(
    reward: rewards.Reward, divergence: Callable[..., torch.Tensor]
) -> None:
    """Of a vocabulary of 50, in float64; the plain sum of p ln(p / t) does not rest there."""
    torch.manual_seed(0)
    teacher = torch.randn(1, 50, dtype=torch.float64)
    eye = torch.eye(50, dtype=torch.float64)
    for start in (torch.randn(1, 50, dtype=torch.float64), teacher):
        logits = start.clone().requires_grad_()
        loss = linear_full_vocab(logits, eye, teacher, eye, reward, 1.0, top_k=7)
        (found,) = torch.autograd.grad(loss, logits)
        likely = logits.topk(7).indices[0]
        t, p = teacher.softmax(1)[0, likely], logits.softmax(1)[0, likely]
        (exact,) = torch.autograd.grad(divergence(t, p), logits, retain_graph=True)
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)
        if start is teacher:
            assert found.abs().max() < 1e-7
            (plain,) = torch.autograd.grad((p * (p / t).log()).sum(), logits)
            assert plain.abs().max() > 0.01
            assert plain[0, likely].min() > 0  # descending lowers the logits of all likely ids
