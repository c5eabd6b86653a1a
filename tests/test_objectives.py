"""Objectives put together from their parts, against hand-written equations."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rollout_cases import make_rollout
from torch import Tensor

from poweropd import rewards
from poweropd.data.batch import Batch, collate
from poweropd.data.rollout import Example
from poweropd.errors import UsageError
from poweropd.kernels import Head, Support, reference
from poweropd.objectives.base import Objective
from poweropd.objectives.full_vocab import FullVocab
from poweropd.objectives.sampled import Sampled
from poweropd.objectives.selection import Random, Selected
from poweropd.rewards import Reward

V, H, H_TEACHER, N = 37, 6, 8, 9
STOPS = torch.tensor([0, 2])
SUPPORT = Support(top_k=12, top_p=0.8, temperature=0.9)
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "semantic": {"merged_ids": STOPS},
    "truncated": {"support": SUPPORT},
    "both": {"merged_ids": STOPS, "support": SUPPORT},
}


class Pair:
    """Random hidden states and heads of two models, and a batch of one completion."""

    def __init__(self, targets: Tensor, seed: int = 0, **options: Any) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        n = len(targets)
        self.weight = normal(V, H).requires_grad_()
        self.teacher_head = Head(normal(V, H_TEACHER))
        self.hidden = normal(1, H).expand(n, H) if options.pop("one_context", 0) else normal(n, H)
        teacher = normal(1, H_TEACHER).expand(n, -1) if n == V else normal(n, H_TEACHER)
        rollout = make_rollout(
            0, [1], targets.tolist(), log_probs=options.pop("log_probs", []), stopped=False
        )
        example = Example(rollout, torch.arange(n), targets, targets, **options)
        self.batch: Batch = replace(collate([example]), teacher_hidden=teacher)

    def gradient(
        self,
        objective: Objective,
        batch: Batch,
        hidden: Tensor,
        reward: Reward,
        token_weight: float = 1.0,
    ) -> Tensor:
        loss, _ = objective(hidden, Head(self.weight), batch, reward, token_weight)
        return torch.autograd.grad(loss, self.weight)[0]

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """Teacher's and student's, [N, V] float64."""
        assert self.batch.teacher_hidden is not None
        teacher = Head(self.teacher_head.weight.double())
        return (
            reference.log_softmax(self.batch.teacher_hidden.double(), teacher),
            reference.log_softmax(self.hidden.double(), Head(self.weight.detach().double())),
        )


def every_token(seed: int = 0) -> Pair:
    """One context, and every next token."""
    return Pair(torch.arange(V), seed, one_context=True)


def expected_gradient(pair: Pair, objective: Objective, probs: Tensor, reward: Reward) -> Tensor:
    """sum_v probs_v * (gradient where v was sampled): [V, H]."""
    total = torch.zeros_like(pair.weight)
    for v in probs.nonzero().flatten():
        one = v[None]
        gradient = pair.gradient(objective, pair.batch.select(one), pair.hidden[one], reward)
        total += probs[v].float() * gradient
    return total


def sampling(pair: Pair, support: Support | None) -> Tensor:
    """[V] probabilities of the next token, by the student's truncated or whole distribution."""
    student = pair.log_probs()[1][:1]
    if support is None:
        return student.exp()[0]
    kept = reference.support(student, support.top_k, support.top_p, support.temperature)
    return reference.truncated(student, kept).exp()[0]


@pytest.mark.parametrize("reward", [rewards.create("log_ratio"), rewards.create("power")])
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_full_vocab_is_the_expectation_of_sampled(
    parts: dict[str, Any], baseline: bool, reward: rewards.Reward
) -> None:
    """Under the distribution that is scored: so the baseline changes no expectation, and neither
    does truncated sampling, if scored under the truncated support."""
    pair = every_token()
    exact = FullVocab(pair.teacher_head, **parts)
    expected = pair.gradient(exact, pair.batch.select(torch.tensor([3])), pair.hidden[:1], reward)
    probs = sampling(pair, parts.get("support"))
    if "support" in parts:  # the one token of the exact batch must not add an id to its support
        inside = probs.argmax()[None]
        expected = pair.gradient(exact, pair.batch.select(inside), pair.hidden[:1], reward)
    sampled = Sampled(pair.teacher_head, baseline=baseline, **parts)
    got = expected_gradient(pair, sampled, probs, reward)
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_a_constant_reward_cancels_only_if_scored_as_it_was_sampled() -> None:
    pair = every_token()
    constant = rewards.Custom("one", lambda t, p: torch.ones_like(p))
    probs = sampling(pair, SUPPORT)
    head = pair.teacher_head
    truncated = expected_gradient(pair, Sampled(head, support=SUPPORT), probs, constant)
    full = expected_gradient(pair, Sampled(head), probs, constant)
    assert truncated.norm() < 1e-5
    assert full.norm() > 0.1


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_record_and_loss_are_those_of_the_equation(parts: dict[str, Any]) -> None:
    targets = torch.tensor([0, 5, 2, 7, 7, 30, 2, 11, 1])
    bonus, log_probs = 0.25, [-1.0 * i for i in range(N)]
    pair = Pair(targets, task_reward=bonus, log_probs=log_probs)
    teacher, student = pair.log_probs()
    full = student
    if "support" in parts:
        kept = reference.support(student, SUPPORT.top_k, SUPPORT.top_p, SUPPORT.temperature)
        kept.scatter_(1, targets[:, None], True)
        teacher, student = (reference.truncated(x, kept) for x in (teacher, student))
    merged = torch.isin(targets, STOPS) if "merged_ids" in parts else torch.zeros(N).bool()

    def of_targets(x: Tensor) -> Tensor:
        own = x.gather(1, targets[:, None])[:, 0]
        return torch.where(merged, x[:, STOPS].logsumexp(1), own)

    reward = rewards.create("power", alpha=2.0)
    t, p = of_targets(teacher), of_targets(student)
    r = reward(t, p).double()
    if "merged_ids" in parts:
        others = [v for v in range(V) if v not in STOPS.tolist()]
        teacher, student = (
            torch.cat([x[:, others], x[:, STOPS].logsumexp(1, keepdim=True)], 1)
            for x in (teacher, student)
        )
    values = (student.exp() * reward(teacher, student)).sum(1)
    ratio = full.gather(1, targets[:, None])[:, 0] - torch.tensor(log_probs)
    weights = torch.where(merged, 1.0, ratio.exp().clamp(max=2.0))
    assert 0 < (weights == 2.0).sum() < N
    objective = Sampled(pair.teacher_head, baseline=True, correction=True, **parts)
    loss, record = objective(pair.hidden, Head(pair.weight), pair.batch, reward, 0.5)
    expected = -(0.5 * weights * (r + bonus - values) * p).sum()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-5)
    for got, wanted in (
        (record.student_log_probs, p),
        (record.teacher_log_probs, t),
        (record.rewards, r),
        (record.weights, weights),
        (record.sampler_log_ratios, ratio.masked_fill(merged, torch.nan)),
    ):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_bonus_of_full_vocab_is_a_sampled_reward(parts: dict[str, Any]) -> None:
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    plain, with_bonus = Pair(targets), Pair(targets, task_reward=-0.7)
    objective, sampled = (kind(plain.teacher_head, **parts) for kind in (FullVocab, Sampled))
    power = rewards.create("power")
    nothing = rewards.Custom("none", lambda t, p: torch.zeros_like(p))
    gradients = [
        pair.gradient(its, pair.batch, pair.hidden, reward, 0.5)
        for pair, its, reward in (
            (with_bonus, objective, power),
            (plain, objective, power),
            (with_bonus, sampled, nothing),
        )
    ]
    torch.testing.assert_close(gradients[0], gradients[1] + gradients[2], rtol=1e-4, atol=1e-5)
    assert gradients[2].norm() > 0


@pytest.mark.parametrize("name", ["log_ratio", "power"])
def test_the_loss_of_full_vocab_is_its_divergence(name: str) -> None:
    """Reverse KL, and the density-power divergence at alpha 2."""
    pair = Pair(torch.arange(N))
    reward = rewards.create(name, **({"alpha": 2.0} if name == "power" else {}))
    loss, _ = FullVocab(pair.teacher_head)(
        pair.hidden, Head(pair.weight), pair.batch, reward, 1 / N
    )
    log_t, log_p = pair.log_probs()
    t, p = log_t.exp(), log_p.exp()
    divergences = {
        "log_ratio": (p * (log_p - log_t)).sum(1),
        "power": (p**3 / 3 - p * t**2 + 2 * t**3 / 3).sum(1),
    }
    torch.testing.assert_close(loss.double(), divergences[name].mean(), rtol=1e-4, atol=1e-6)


def test_top_k_looks_at_the_students_most_probable_ids() -> None:
    pair = Pair(torch.arange(N))
    reward = rewards.create("power")
    objective = FullVocab(pair.teacher_head, top_k=4)
    got = pair.gradient(objective, pair.batch, pair.hidden, reward, 1 / N)
    weight = pair.weight.detach().double().requires_grad_()
    student = reference.log_softmax(pair.hidden.double(), Head(weight))
    loss = reference.full_vocab(
        student, pair.log_probs()[0], reward, torch.full((N,), 1 / N), top_k=4
    )
    expected = torch.autograd.grad(loss, weight)[0].float()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_correction_without_the_samplers_log_probs_is_refused() -> None:
    pair = Pair(torch.arange(N))
    assert pair.batch.sampling_log_probs is None
    objective = Sampled(pair.teacher_head, correction=True)
    with pytest.raises(UsageError, match=r"^rollout.correction: truncated needs the sampler's"):
        objective(pair.hidden, Head(pair.weight), pair.batch, rewards.create("power"), 1.0)


def test_a_token_scored_as_another_has_no_importance_weight() -> None:
    """With objective.stop=canonical the last target is not what was sampled."""
    rollout = make_rollout(0, [1], [5, 7, 0], log_probs=[-1.0, -2.0, -3.0])
    targets = torch.tensor([5, 7, 2])
    log_probs = Example(rollout, torch.arange(3), targets, targets).sampling_log_probs
    assert log_probs is not None
    assert log_probs[:2].tolist() == [-1.0, -2.0]
    assert log_probs[2].isnan()


Make = Callable[[Head], Objective]


@pytest.mark.parametrize(
    "make",
    [
        lambda head: Selected(Sampled(head, baseline=True), Random(0.5)),
        lambda head: FullVocab(head, top_k=3, merged_ids=STOPS, support=SUPPORT),
    ],
)
def test_a_batch_of_nothing_has_a_loss_of_zero_and_a_gradient(make: Make) -> None:
    """A process with nothing to train on takes part in the collective backward."""
    pair = Pair(torch.arange(N))
    batch = replace(collate([]), teacher_hidden=torch.empty(0, H_TEACHER))
    objective, reward = make(pair.teacher_head), rewards.create("power")
    loss, record = objective(pair.hidden[:0], Head(pair.weight), batch, reward, 1.0)
    assert loss.item() == len(record.rewards) == 0
    assert not torch.autograd.grad(loss, pair.weight)[0].any()
