"""The full-vocabulary kernel and the value baseline against their float64 oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import (
    CHUNK,
    HEADS,
    MERGED,
    REWARDS,
    Case,
    V,
    error,
    gradients,
    options_of,
    oracle,
)
from torch import Tensor

from poweropd import rewards
from poweropd.kernels import (
    Head,
    PairStatistics,
    TeacherHead,
    full_vocab_loss,
    linear_full_vocab,
    linear_log_prob,
    linear_policy_gradient,
    reference,
    sampled_loss,
    score_tokens,
)


def full_vocab(
    case: Case, dtype: torch.dtype, reward: rewards.Reward, **options: Any
) -> list[Tensor]:
    hidden, head = case.leaves(dtype)
    teacher_hidden, teacher = case.teacher(dtype)
    loss = linear_full_vocab(
        hidden,
        head.weight,
        teacher_hidden,
        teacher.weight,
        reward,
        case.coefficient,
        teacher_options=options_of(teacher),
        **{"chunk_size": CHUNK, **options_of(head), **options},
    )
    return [loss.detach().double(), *gradients(loss, hidden, head)]


def full_vocab_oracle(
    case: Case,
    dtype: torch.dtype,
    reward: Callable[[Tensor, Tensor], Tensor],
    top_k: int | None = None,
    merged_ids: Tensor | None = None,
) -> list[Tensor]:
    hidden, head = case.leaves(dtype)
    student = reference.log_softmax(hidden, head, merged_ids)
    teacher = reference.log_softmax(*case.teacher(dtype), merged_ids)
    weight = case.coefficient.to(dtype)
    loss = reference.full_vocab(student, teacher, reward, weight, top_k)
    divergence = -reference.values(teacher, student, reward).detach()
    return [(weight * divergence).sum().double(), *gradients(loss, hidden, head)]


@pytest.mark.parametrize("merged_ids", [None, MERGED], ids=["single", "merged"])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("n", [0, 1, CHUNK, 2 * CHUNK + 1])
def test_full_vocab_is_the_oracles(
    n: int, head: str, top_k: int | None, merged_ids: Tensor | None
) -> None:
    case = Case(n, torch.float64, head)

    def reward(t: Tensor, p: Tensor) -> Tensor:
        return t.exp() - p.exp()

    loss, *got = full_vocab(case, torch.float64, reward, top_k=top_k, merged_ids=merged_ids)
    exact_loss, *exact = full_vocab_oracle(case, torch.float64, reward, top_k, merged_ids)
    if top_k is None:
        torch.testing.assert_close(loss, exact_loss, rtol=1e-6, atol=1e-6)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.0), (torch.bfloat16, 1.5)])
def test_full_vocab_error_is_no_worse_than_plain_autograd(
    dtype: torch.dtype, factor: float, name: str
) -> None:
    reward, totals = REWARDS[name], torch.zeros(2, 2)
    for seed in range(20):
        case = Case(50, dtype, seed=seed)

        def exact_reward(t: Tensor, p: Tensor) -> Tensor:
            return reward.compute(t, p)

        exact = full_vocab_oracle(case, torch.float64, exact_reward)[1:]
        plain = full_vocab_oracle(case, dtype, reward)[1:]
        ours = full_vocab(case, dtype, reward)[1:]
        for i, (g, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
            totals[0, i] += error(g, e)
            totals[1, i] += error(p, e)
    assert (totals[0] <= factor * totals[1]).all(), totals


@pytest.mark.parametrize("name", ["log_ratio", "power"])
def test_full_vocab_reports_a_divergence_and_descends_on_it(name: str) -> None:
    """Reverse KL and density power: the gradient is autograd's of the reported value."""
    case, reward = Case(20, torch.float64), REWARDS[name]
    hidden, head = case.leaves(torch.float64)
    student = reference.log_softmax(hidden, head)
    teacher = reference.log_softmax(*case.teacher(torch.float64))
    divergences = {
        "log_ratio": lambda t, p: (p.exp() * (p - t)).sum(-1),
        "power": reward.divergence,
    }
    loss = (case.coefficient * divergences[name](teacher, student)).sum()
    got_loss, *got = full_vocab(case, torch.float64, reward, value=reward.divergence)
    torch.testing.assert_close(got_loss, loss.detach(), rtol=1e-6, atol=1e-6)
    for g, e in zip(got, gradients(loss, hidden, head), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


def test_top_k_of_everything_is_the_full_vocabulary() -> None:
    case = Case(10, torch.float64)
    for g, e in zip(
        full_vocab(case, torch.float64, REWARDS["power"], top_k=V),
        full_vocab(case, torch.float64, REWARDS["power"]),
        strict=True,
    ):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("use_baseline", [False, True])
def test_full_vocab_is_the_expected_policy_gradient(use_baseline: bool) -> None:
    """All V targets of each context, weighted by p: with and without the value baseline."""
    case, reward = Case(3, torch.float64), REWARDS["power"]
    case.coefficient.fill_(1.0)
    hidden, head = case.leaves(torch.float64)
    teacher_hidden, teacher = case.teacher(torch.float64)
    every = torch.arange(V).repeat(3)
    its_head = TeacherHead(teacher_hidden.repeat_interleave(V, 0), teacher, reward=reward)
    used = 1.0 if use_baseline else 0.0

    def coefficient(chunk: PairStatistics, tokens: slice) -> Tensor:
        r = reward(chunk.teacher_log_probs, chunk.log_probs) - used * chunk.values
        return chunk.log_probs.exp() * r

    repeated = hidden.repeat_interleave(V, 0)
    loss, _ = sampled_loss(repeated, head, every, coefficient, its_head, chunk_size=CHUNK)
    expected = full_vocab(case, torch.float64, reward)[1:]
    for g, e in zip(gradients(loss, hidden, head), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("merged_ids", [None, MERGED], ids=["single", "merged"])
def test_values_and_teacher_log_probs(merged_ids: Tensor | None) -> None:
    case, reward = Case(20, torch.float32), REWARDS["power"]
    teacher = TeacherHead(*case.teacher(torch.float32), reward=reward)
    seen: list[Tensor] = []

    def coefficient(chunk: PairStatistics, tokens: slice) -> Tensor:
        seen.append(torch.stack([chunk.values, chunk.teacher_log_probs]))
        return case.coefficient[tokens]

    hidden, head = case.leaves(torch.float32)
    options = {"merged_ids": merged_ids, "chunk_size": CHUNK}
    loss, statistics = sampled_loss(hidden, head, case.targets, coefficient, teacher, **options)
    got = [loss.detach().double(), *gradients(loss, hidden, head)]
    for g, e in zip(got, oracle(case, torch.float64, merged_ids), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    whole = torch.stack([statistics.values, statistics.teacher_log_probs])
    assert torch.equal(torch.cat(seen, 1), whole)
    hidden, head = case.leaves(torch.float64)
    t64 = case.teacher(torch.float64)
    values = reference.values(
        reference.log_softmax(*t64, merged_ids),
        reference.log_softmax(hidden, head, merged_ids),
        reward,
    )
    torch.testing.assert_close(statistics.values.double(), values.detach(), rtol=1e-5, atol=1e-6)
    log_probs = reference.log_prob(*t64, case.targets, merged_ids).float()
    torch.testing.assert_close(statistics.teacher_log_probs, log_probs, rtol=1e-5, atol=1e-5)


def test_full_vocab_statistics_are_those_of_the_sampled_path() -> None:
    case = Case(20, torch.float32)
    teacher_hidden, teacher = case.teacher(torch.float32)
    inputs = (case.hidden, Head(case.weight), case.targets)
    its_head = TeacherHead(teacher_hidden, teacher, reward=REWARDS["clip"])
    options = {"merged_ids": MERGED, "chunk_size": CHUNK}
    loss, got = full_vocab_loss(*inputs, its_head, case.coefficient, **options)
    expected = score_tokens(*inputs, merged_ids=MERGED)
    of_teacher = linear_log_prob(
        teacher_hidden, teacher.weight, case.targets, scale=teacher.scale, merged_ids=MERGED
    )
    front, *_ = full_vocab(case, torch.float32, REWARDS["clip"], merged_ids=MERGED)
    assert torch.equal(loss.double(), front)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.log_probs, expected.log_probs)
    torch.testing.assert_close(got.teacher_log_probs, of_teacher)
    assert torch.equal(got.top1, expected.top1)


@pytest.mark.parametrize("name", ["clip", "tanh", "power", "hellinger", "tsallis"])
def test_impossible_tokens_of_either_model_make_no_nan(name: str) -> None:
    hidden = torch.full((2, 1), 200.0, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.99], [0.2]], requires_grad=True)
    teacher_bias = torch.tensor([0.0, -torch.inf, -torch.inf, 0.0])
    loss = linear_full_vocab(
        hidden,
        weight,
        torch.ones(2, 1),
        torch.ones(4, 1),
        REWARDS[name],
        1.0,
        bias=torch.tensor([0.0, 0.0, -torch.inf, -torch.inf]),
        teacher_options={"bias": teacher_bias},
    )
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_a_reward_may_return_its_argument() -> None:
    case = Case(10, torch.float64)
    for reward in (lambda t, p: p, lambda t, p: t):
        _, *got = full_vocab(case, torch.float64, reward)
        for g, e in zip(got, full_vocab_oracle(case, torch.float64, reward)[1:], strict=True):
            torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


def test_errors_of_callbacks_and_teachers() -> None:
    case = Case(4, torch.float32)
    with pytest.raises(ValueError, match=r"coefficient: expected \[4\]"):
        linear_policy_gradient(case.hidden, case.weight, case.targets, lambda p, _: p[:2])
    teacher = (case.teacher_hidden, case.teacher_weight)
    with pytest.raises(ValueError, match=r"reward: expected \[4, 61\], got \[4\]"):
        linear_full_vocab(case.hidden, case.weight, *teacher, lambda t, p: p[:, 0], 1.0)
    with pytest.raises(ValueError, match="and the student's 60 ids, got 4 and 61"):
        linear_full_vocab(case.hidden, case.weight[:60], *teacher, REWARDS["clip"], 1.0)
    with pytest.raises(ValueError, match="top_k: expected 1 to 61, got 62"):
        linear_full_vocab(case.hidden, case.weight, *teacher, REWARDS["clip"], 1.0, top_k=62)
    with pytest.raises(ValueError, match=r"token_weight: expected \[4\]"):
        linear_full_vocab(case.hidden, case.weight, *teacher, REWARDS["clip"], torch.ones(3))
    its_head = TeacherHead(case.teacher_hidden, Head(case.teacher_weight))
    with pytest.raises(ValueError, match="teacher reward: expected the reward to train with"):
        full_vocab_loss(case.hidden, Head(case.weight), case.targets, its_head, 1.0)
    fewer = TeacherHead(case.teacher_hidden[:3], its_head.head)
    wrong = TeacherHead(case.teacher_hidden, its_head.head, targets=case.targets[:3])
    for bad, message in ((fewer, "expected 4 tokens"), (wrong, r"teacher targets: expected \[4\]")):
        with pytest.raises(ValueError, match=message):
            sampled_loss(case.hidden, Head(case.weight), case.targets, lambda c, _: c.values, bad)
