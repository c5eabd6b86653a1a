"""The kernels against their float64 oracle: values, gradients, statistics, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poweropd import rewards
from poweropd.kernels import (
    Head,
    TokenStatistics,
    ValueBaseline,
    linear_full_vocab,
    linear_log_prob,
    linear_policy_gradient,
    reference,
)

V, H, CHUNK = 61, 8, 6  # V is prime
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.7, "temperature": 1.3},
    "capped": {"scale": 1.5, "softcap": 2.0, "temperature": 0.9},
    "bias": {"bias": True, "scale": 0.5, "softcap": 5.0},
}
MERGED = torch.tensor([3, 7, 7, 50])


class Case:
    """Random inputs of a head in one dtype, and the same values in float64 or any other."""

    def __init__(self, n: int, dtype: torch.dtype, head: str = "plain", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        options = dict(HEADS[head])

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.hidden, self.weight = normal(n, H), normal(V, H)
        self.bias = normal(V) if options.pop("bias", False) else None
        self.options = options
        self.targets = torch.randint(V, (n,), generator=generator)
        self.targets[: n // 3] = 7
        self.coefficient = torch.randn(n, generator=generator)
        self.coefficient[n // 4 : n // 2] = 0
        self.teacher_hidden = normal(n, H + 2)
        self.teacher_weight = normal(V, H + 2)

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Head]:
        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype, copy=True).requires_grad_()

        bias = None if self.bias is None else leaf(self.bias)
        return leaf(self.hidden), Head(leaf(self.weight), bias, **self.options)

    def teacher(self, dtype: torch.dtype) -> tuple[Tensor, Head]:
        return self.teacher_hidden.to(dtype), Head(self.teacher_weight.to(dtype), scale=0.8)


def gradients(loss: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    inputs = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return [g.double() for g in torch.autograd.grad(loss, inputs)]


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()


def policy_gradient(case: Case, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    hidden, head = case.leaves(dtype)
    loss = linear_policy_gradient(
        hidden,
        head.weight,
        case.targets,
        lambda log_probs, tokens: case.coefficient[tokens],
        **{"chunk_size": CHUNK, **head.options, **options},
    )
    assert loss.dtype == torch.float32
    return [loss.detach().double(), *gradients(loss, hidden, head)]


def oracle(case: Case, dtype: torch.dtype, merged_ids: Tensor | None = None) -> list[Tensor]:
    hidden, head = case.leaves(dtype)
    loss = reference.policy_gradient(
        hidden, head, case.targets, lambda _: case.coefficient.to(dtype), merged_ids
    )
    return [loss.detach().double(), *gradients(loss, hidden, head)]


@pytest.mark.parametrize("merged_ids", [None, MERGED], ids=["single", "merged"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("n", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK + 5])
def test_policy_gradient_is_the_oracles(n: int, head: str, merged_ids: Tensor | None) -> None:
    case = Case(n, torch.float64, head)
    loss, *got = policy_gradient(case, torch.float64, merged_ids=merged_ids)
    exact_loss, *exact = oracle(case, torch.float64, merged_ids)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-6, atol=1e-6)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1.0), (torch.bfloat16, 1.5), (torch.float16, 1.0)]
)
def test_error_is_no_worse_than_plain_autograd(
    dtype: torch.dtype, factor: float, head: str
) -> None:
    totals = torch.zeros(2, 4)
    for seed in range(10):
        case = Case(50, dtype, head, seed)
        exact = oracle(case, torch.float64)
        plain = naive_low_precision(case, dtype)
        for i, (g, p, e) in enumerate(zip(policy_gradient(case, dtype), plain, exact, strict=True)):
            totals[0, i] += error(g, e)
            totals[1, i] += error(p, e)
    ours, theirs = totals[:, 1:]
    # The margin is for chance where both are at the rounding floor.
    assert (ours <= 1.1 * factor * theirs + 1e-9).all(), (ours, theirs)


def naive_low_precision(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The usual implementation: logits in the model's dtype, log-softmax in float32."""
    hidden, head = case.leaves(dtype)
    log_probs = reference.logits(hidden, head).float().log_softmax(-1)
    own = log_probs.gather(1, case.targets[:, None]).squeeze(1)
    loss = -(case.coefficient * own).sum()
    return [loss.detach().double(), *gradients(loss, hidden, head)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged_ids", [None, MERGED], ids=["single", "merged"])
def test_log_prob_and_statistics(dtype: torch.dtype, merged_ids: Tensor | None) -> None:
    case = Case(40, dtype, "capped")
    hidden, head = case.leaves(torch.float64)
    statistics = TokenStatistics.empty(40, "cpu")
    got = linear_log_prob(
        case.hidden,
        case.weight,
        case.targets,
        merged_ids=merged_ids,
        statistics=statistics,
        chunk_size=CHUNK,
        **case.options,
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.1}
    exact = reference.log_prob(hidden, head, case.targets, merged_ids)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), exact.detach(), **tolerance)
    torch.testing.assert_close(statistics.student_log_probs, got)
    log_probs = reference.logits(hidden, head).log_softmax(-1).detach()
    entropy = reference.entropy(log_probs)
    torch.testing.assert_close(statistics.entropy.double(), entropy, **tolerance)
    best = log_probs.argmax(1)
    hit = best == case.targets
    if merged_ids is not None:
        hit |= torch.isin(best, merged_ids) & torch.isin(case.targets, merged_ids)
    if dtype == torch.float32:
        assert torch.equal(statistics.top1, hit)
    assert statistics.teacher_log_probs.isnan().all()


def test_coefficient_sees_float32_log_probs_in_order() -> None:
    case = Case(15, torch.bfloat16)
    seen: list[tuple[slice, Tensor]] = []

    def coefficient(log_probs: Tensor, tokens: slice) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append((tokens, log_probs))
        return torch.ones_like(log_probs)

    linear_policy_gradient(case.hidden, case.weight, case.targets, coefficient, chunk_size=CHUNK)
    assert [tokens for tokens, _ in seen] == [slice(0, 6), slice(6, 12), slice(12, 15)]
    log_probs = torch.cat([log_probs for _, log_probs in seen])
    assert torch.equal(log_probs, linear_log_prob(case.hidden, case.weight, case.targets))


def test_tied_head_gathers_both_gradients() -> None:
    ids = torch.tensor([5, 9, 60, 5])
    targets = torch.tensor([9, 60, 5, 1])
    grads = []
    for kernel in (True, False):
        torch.manual_seed(0)
        embedding = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
        hidden = embedding[ids].tanh()
        loss = (
            linear_policy_gradient(
                hidden, embedding, targets, lambda p, _: torch.ones_like(p), chunk_size=3
            )
            if kernel
            else reference.policy_gradient(hidden, Head(embedding), targets, torch.ones_like)
        )
        loss.backward()
        grads.append(embedding.grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_only_what_is_asked_for() -> None:
    case = Case(10, torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_gradient(
            hidden, weight, case.targets, lambda p, t: case.coefficient[t], chunk_size=CHUNK
        )

    _, *exact = oracle(case, torch.float64)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight
    loss(hidden, weight).backward()
    torch.testing.assert_close(hidden.grad.double(), exact[0], rtol=1e-4, atol=1e-5)
    assert weight.grad is None
    weight = case.weight.clone().requires_grad_()
    loss(case.hidden, weight).backward()
    torch.testing.assert_close(weight.grad.double(), exact[1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not loss(hidden, weight).requires_grad
    assert not loss(case.hidden, case.weight).requires_grad


def test_grad_output_scales_and_a_second_backward_is_refused() -> None:
    case = Case(10, torch.float32)
    hidden, head = case.leaves(torch.float32)
    loss = linear_policy_gradient(
        hidden, head.weight, case.targets, lambda p, t: case.coefficient[t]
    )
    (3.0 * loss).backward(retain_graph=True)
    _, *exact = oracle(case, torch.float64)
    torch.testing.assert_close(hidden.grad.double(), 3 * exact[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.weight.grad.double(), 3 * exact[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_all_coefficients_zero() -> None:
    case = Case(10, torch.float32, "bias")
    case.coefficient.zero_()
    assert all((x == 0).all() for x in policy_gradient(case, torch.float32))


def test_extreme_logits() -> None:
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    statistics = TokenStatistics.empty(3)
    loss = linear_policy_gradient(
        hidden, weight, torch.zeros(3, dtype=torch.long), lambda p, _: torch.ones_like(p),
        statistics=statistics,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss.item(), 2e4 + torch.tensor(3.0).log().item())
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert statistics.top1.tolist() == [True, False, True]
    torch.testing.assert_close(statistics.entropy, torch.tensor([0.0, 0.0, 1.0986123]))


def test_bias_of_minus_infinity_masks_an_id() -> None:
    case = Case(12, torch.float32, "bias")
    assert case.bias is not None
    case.bias[11] = -torch.inf
    case.targets[case.targets == 11] = 12
    case.options = {}
    statistics = TokenStatistics.empty(12)
    loss, *got = policy_gradient(case, torch.float32, statistics=statistics)
    assert all(x.isfinite().all() for x in (loss, *got, statistics.entropy))
    assert got[2][11] == 0
    exact_loss, *exact = oracle(case, torch.float64)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[0], exact[0], rtol=1e-4, atol=1e-5)


# Full vocabulary and value baseline

REWARDS = {
    name: rewards.create(name) for name in ("log_ratio", "clip", "tanh", "power", "hellinger")
}


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
        teacher_options=teacher.options,
        **{"chunk_size": CHUNK, **head.options, **options},
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
    # Autograd's own log-softmax backward fuses a multiply-add: one rounding less, about 6%.
    assert (totals[0] <= 1.15 * factor * totals[1]).all(), totals


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
    baseline = ValueBaseline(teacher_hidden.repeat_interleave(V, 0), teacher, reward)
    used = 1.0 if use_baseline else 0.0

    def coefficient(log_probs: Tensor, tokens: slice) -> Tensor:
        r = reward(baseline.teacher_log_probs[tokens], log_probs) - used * baseline.values[tokens]
        return log_probs.exp() * r

    loss = linear_policy_gradient(
        hidden.repeat_interleave(V, 0),
        head.weight,
        every,
        coefficient,
        baseline=baseline,
        chunk_size=CHUNK,
    )
    expected = full_vocab(case, torch.float64, reward)[1:]
    for g, e in zip(gradients(loss, hidden, head), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("merged_ids", [None, MERGED], ids=["single", "merged"])
def test_baseline_values_and_teacher_log_probs(merged_ids: Tensor | None) -> None:
    case, reward = Case(20, torch.float32), REWARDS["power"]
    teacher_hidden, teacher = case.teacher(torch.float32)
    baseline = ValueBaseline(teacher_hidden, teacher, reward)
    statistics = TokenStatistics.empty(20)
    got = policy_gradient(
        case, torch.float32, baseline=baseline, merged_ids=merged_ids, statistics=statistics
    )
    for g, e in zip(got, oracle(case, torch.float64, merged_ids), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    hidden, head = case.leaves(torch.float64)
    t64 = case.teacher(torch.float64)
    values = reference.values(
        reference.log_softmax(*t64, merged_ids),
        reference.log_softmax(hidden, head, merged_ids),
        reward,
    )
    torch.testing.assert_close(baseline.values.double(), values.detach(), rtol=1e-5, atol=1e-6)
    log_probs = reference.log_prob(*t64, case.targets, merged_ids)
    torch.testing.assert_close(baseline.teacher_log_probs, log_probs.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.teacher_log_probs, baseline.teacher_log_probs)


def test_full_vocab_statistics_are_those_of_the_sampled_path() -> None:
    case = Case(20, torch.float32)
    teacher_hidden, teacher = case.teacher(torch.float32)
    got, expected = TokenStatistics.empty(20), TokenStatistics.empty(20)
    options = {"targets": case.targets, "statistics": got, "merged_ids": MERGED}
    full_vocab(case, torch.float32, REWARDS["clip"], **options)
    linear_log_prob(case.hidden, case.weight, case.targets, statistics=expected, merged_ids=MERGED)
    of_teacher = linear_log_prob(
        teacher_hidden, teacher.weight, case.targets, scale=teacher.scale, merged_ids=MERGED
    )
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.student_log_probs, expected.student_log_probs)
    torch.testing.assert_close(got.teacher_log_probs, of_teacher)
    assert torch.equal(got.top1, expected.top1)


@pytest.mark.parametrize("reward", [REWARDS[n] for n in ("clip", "tanh", "power", "hellinger")])
def test_impossible_tokens_of_either_model_make_no_nan(reward: rewards.Reward) -> None:
    hidden = torch.full((2, 1), 200.0, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.99], [0.2]], requires_grad=True)
    teacher_bias = torch.tensor([0.0, -torch.inf, -torch.inf, 0.0])
    loss = linear_full_vocab(
        hidden,
        weight,
        torch.ones(2, 1),
        torch.ones(4, 1),
        reward,
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


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 20),
    chunk=st.integers(1, 25),
    zero=st.lists(st.booleans(), min_size=20, max_size=20),
    seed=st.integers(0, 10**6),
)
def test_any_chunk_and_any_skipped_rows(n: int, chunk: int, zero: list[bool], seed: int) -> None:
    case = Case(n, torch.float64, "capped", seed)
    case.coefficient[torch.tensor(zero[:n])] = 0
    got = policy_gradient(case, torch.float64, chunk_size=chunk)[1:]
    for g, e in zip(got, oracle(case, torch.float64)[1:], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "hidden": ({"hidden": torch.zeros(4, 9)}, r"got \[4, 9\] and \[61, 8\]"),
    "dtype": ({"hidden": torch.zeros(4, 8).bfloat16()}, "got torch.bfloat16 and torch.float32"),
    "targets": ({"targets": torch.zeros(3, dtype=torch.long)}, r"expected \[4\] torch.int64"),
    "ids": ({"targets": torch.zeros(4, dtype=torch.int32)}, "got .* torch.int32"),
    "bias": ({"bias": torch.zeros(5)}, r"expected \[61\], got \[5\]"),
    "temperature": ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
    "merged": ({"merged_ids": torch.zeros(2)}, r"merged_ids: expected \[M\] torch.int64"),
    "chunk": ({"chunk_size": 0}, "chunk_size: expected an integer >= 1, got 0"),
    "statistics": ({"statistics": TokenStatistics.empty(3)}, r"expected \[4\] torch.float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_was_expected_and_got(name: str) -> None:
    changed, message = BAD[name]
    good = {"hidden": torch.zeros(4, H), "weight": torch.zeros(V, H)}
    good["targets"] = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        linear_log_prob(**{**good, **changed})
    with pytest.raises(ValueError, match=message):
        linear_policy_gradient(**{**good, **changed}, coefficient=lambda p, _: p)


def test_errors_of_callbacks_and_teachers() -> None:
    case = Case(4, torch.float32)
    with pytest.raises(ValueError, match=r"coefficient: expected \[4\]"):
        linear_policy_gradient(case.hidden, case.weight, case.targets, lambda p, _: p[:2])
    teacher = (case.teacher_hidden, case.teacher_weight)
    with pytest.raises(ValueError, match=r"reward: expected \[4, 61\], got \[4\]"):
        linear_full_vocab(case.hidden, case.weight, *teacher, lambda t, p: p[:, 0], 1.0)
    with pytest.raises(ValueError, match="expected the student's 60 rows, got 61"):
        linear_full_vocab(case.hidden, case.weight[:60], *teacher, REWARDS["clip"], 1.0)
    with pytest.raises(ValueError, match="top_k: expected 1 to 61, got 62"):
        linear_full_vocab(case.hidden, case.weight, *teacher, REWARDS["clip"], 1.0, top_k=62)
    with pytest.raises(ValueError, match=r"token_weight: expected \[4\]"):
        linear_full_vocab(case.hidden, case.weight, *teacher, REWARDS["clip"], torch.ones(3))
