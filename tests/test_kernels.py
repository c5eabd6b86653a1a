"""The sampled kernels against their float64 oracle: values, gradients, statistics, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    CHUNK,
    HEADS,
    MERGED,
    Case,
    H,
    V,
    error,
    gradients,
    options_of,
    oracle,
    policy_gradient,
)
from torch import Tensor

from poweropd.kernels import (
    Head,
    PairStatistics,
    linear_log_prob,
    linear_policy_gradient,
    reference,
    sampled_loss,
    score_tokens,
)


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
    """With rows, and whole chunks, that are skipped."""
    totals = torch.zeros(2, 4)
    for seed in range(100):
        case = Case(50, dtype, head, seed)
        exact = oracle(case, torch.float64)
        plain = naive_low_precision(case, dtype)
        for i, (g, p, e) in enumerate(zip(policy_gradient(case, dtype), plain, exact, strict=True)):
            totals[0, i] += error(g, e)
            totals[1, i] += error(p, e)
    ours, theirs = totals[:, 1:]
    # In float32 both make the same roundings; a ratio of 100 seeds has a standard error of 1 to 2%.
    assert (ours <= 1.04 * factor * theirs).all(), (ours, theirs)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.0), (torch.bfloat16, 1.5)])
def test_error_of_a_tied_head_is_no_worse_than_plain_autograd(
    dtype: torch.dtype, factor: float
) -> None:
    totals = torch.zeros(2)
    for seed in range(100):
        case = Case(50, dtype, seed=seed)
        exact = tied_gradient(case, torch.float64, reference.policy_gradient)
        ours = tied_gradient(case, dtype, linear_loss)
        theirs = tied_gradient(case, dtype, low_precision_loss)
        totals += torch.tensor([error(ours, exact), error(theirs, exact)])
    assert totals[0] <= 1.04 * factor * totals[1], totals


def tied_gradient(
    case: Case, dtype: torch.dtype, loss: Callable[[Tensor, Head, Tensor, Any], Tensor]
) -> Tensor:
    """Of an embedding that is the head too."""
    embedding = case.weight.detach().to(dtype, copy=True).requires_grad_()
    hidden = embedding[case.targets.roll(1)].tanh()
    coefficient = case.coefficient.to(torch.promote_types(dtype, torch.float32))
    loss(hidden, Head(embedding), case.targets, lambda _: coefficient).backward()
    assert embedding.grad is not None
    return embedding.grad.double()


def linear_loss(hidden: Tensor, head: Head, targets: Tensor, coefficient: Any) -> Tensor:
    return linear_policy_gradient(
        hidden, head.weight, targets, lambda p, t: coefficient(p)[t], chunk_size=CHUNK
    )


def low_precision_loss(hidden: Tensor, head: Head, targets: Tensor, coefficient: Any) -> Tensor:
    log_probs = reference.logits(hidden, head).float().log_softmax(-1)
    own = log_probs.gather(1, targets[:, None]).squeeze(1)
    return -(coefficient(own) * own).sum()


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_of_any_dtype_meets_float32_hidden_states(weight_dtype: torch.dtype) -> None:
    case = Case(20, weight_dtype)
    hidden, head = case.leaves(weight_dtype)
    hidden = hidden.detach().float().requires_grad_()
    _, *exact = oracle(case, torch.float64)
    loss = linear_loss(hidden, head, case.targets, lambda _: case.coefficient)
    for got, expected in zip(gradients(loss, hidden, head), exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("head", HEADS)
def test_gradient_of_a_float32_weight_is_not_rounded_to_the_compute_dtype(head: str) -> None:
    """Nearer to float64 than that of a weight that is cast outside, as autograd then casts it."""
    totals = torch.zeros(2)
    for seed in range(10):
        case = Case(50, torch.bfloat16, head, seed)
        exact = oracle(case, torch.float64)[2]
        got = policy_gradient_of_masters(case, inside=True)
        cast = policy_gradient_of_masters(case, inside=False)
        assert torch.equal(got.bfloat16(), cast.bfloat16())
        assert not torch.equal(got.bfloat16().float(), got)
        totals += torch.tensor([error(got, exact), error(cast, exact)])
    assert totals[0] < totals[1]


def policy_gradient_of_masters(case: Case, inside: bool) -> Tensor:
    """[V, H] float32, of a float32 weight beside bf16 hidden states."""
    hidden, head = case.leaves(torch.bfloat16)
    master = case.weight.float().requires_grad_()
    loss = linear_policy_gradient(
        hidden,
        master if inside else master.bfloat16(),
        case.targets,
        lambda _, t: case.coefficient[t],
        **options_of(head),
    )
    loss.backward()
    assert master.grad is not None
    return master.grad


def naive_low_precision(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The usual implementation: logits in the model's dtype, log-softmax in float32."""
    hidden, head = case.leaves(dtype)
    loss = low_precision_loss(hidden, head, case.targets, lambda _: case.coefficient)
    return [loss.detach().double(), *gradients(loss, hidden, head)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged_ids", [None, MERGED], ids=["single", "merged"])
def test_log_prob_and_statistics(dtype: torch.dtype, merged_ids: Tensor | None) -> None:
    case = Case(40, dtype, "capped")
    hidden, head = case.leaves(torch.float64)
    chunked = {"merged_ids": merged_ids, "chunk_size": CHUNK}
    got = linear_log_prob(case.hidden, case.weight, case.targets, **chunked, **case.options)
    its_head = Head(case.weight, **case.options)
    statistics = score_tokens(case.hidden, its_head, case.targets, **chunked)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.1}
    exact = reference.log_prob(hidden, head, case.targets, merged_ids)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), exact.detach(), **tolerance)
    assert torch.equal(statistics.log_probs, got)
    without = score_tokens(case.hidden, its_head, case.targets, **chunked, entropy=False)
    assert without.entropy.isnan().all()
    assert torch.equal(without.log_probs, got)
    assert torch.equal(without.top1, statistics.top1)
    log_probs = reference.logits(hidden, head).log_softmax(-1).detach()
    entropy = reference.entropy(log_probs)
    torch.testing.assert_close(statistics.entropy.double(), entropy, **tolerance)
    best = log_probs.argmax(1)
    hit = best == case.targets
    if merged_ids is not None:
        hit |= torch.isin(best, merged_ids) & torch.isin(case.targets, merged_ids)
    if dtype == torch.float32:
        assert torch.equal(statistics.top1, hit)
    assert not statistics.log_support.any()


@pytest.mark.parametrize("merged_ids", [None, MERGED], ids=["single", "merged"])
def test_a_loss_returns_the_statistics_of_scoring(merged_ids: Tensor | None) -> None:
    case = Case(40, torch.float32, "capped")
    hidden, head = case.leaves(torch.float32)
    chunked = {"merged_ids": merged_ids, "chunk_size": CHUNK}
    seen: list[Tensor] = []

    def coefficient(chunk: PairStatistics, tokens: slice) -> Tensor:
        seen.append(torch.stack([chunk.log_probs, chunk.entropy, chunk.top1, chunk.values]))
        return case.coefficient[tokens]

    loss, got = sampled_loss(hidden, head, case.targets, coefficient, **chunked)
    expected = score_tokens(hidden, head, case.targets, **chunked)
    for name, column in vars(expected).items():
        assert torch.equal(vars(got)[name], column), name
    assert got.teacher_log_probs.isnan().all()
    assert not got.values.any()
    whole = torch.stack([got.log_probs, got.entropy, got.top1, got.values])
    assert torch.equal(torch.cat(seen, 1), whole)
    front, *_ = policy_gradient(case, torch.float32, merged_ids=merged_ids)
    assert torch.equal(loss.detach().double(), front)


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
    targets = torch.zeros(3, dtype=torch.long)
    loss, statistics = sampled_loss(
        hidden, Head(weight), targets, lambda chunk, _: torch.ones_like(chunk.log_probs)
    )
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
    loss, *got = policy_gradient(case, torch.float32)
    statistics = score_tokens(case.hidden, Head(case.weight, case.bias), case.targets)
    assert all(x.isfinite().all() for x in (loss, *got, statistics.entropy))
    assert got[2][11] == 0
    exact_loss, *exact = oracle(case, torch.float64)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[0], exact[0], rtol=1e-4, atol=1e-5)


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
    "dtype": ({"weight": torch.zeros(61, 8).int()}, "got torch.float32 and torch.int32"),
    "targets": ({"targets": torch.zeros(3, dtype=torch.long)}, r"expected \[4\] torch.int64"),
    "ids": ({"targets": torch.zeros(4, dtype=torch.int32)}, "got .* torch.int32"),
    "bias": ({"bias": torch.zeros(5)}, r"expected \[61\], got \[5\]"),
    "temperature": ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
    "merged": ({"merged_ids": torch.zeros(2)}, r"merged_ids: expected \[M\] torch.int64"),
    "chunk": ({"chunk_size": 0}, "chunk_size: expected an integer >= 1, got 0"),
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
