"""The kernel of a teacher's k most probable ids against its float64 oracle, and its bias."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CHUNK, HEADS, REWARDS, Case, V, error, gradients, options_of
from torch import Tensor

from poweropd import rewards
from poweropd.kernels import (
    Head,
    PairStatistics,
    TeacherTopK,
    linear_full_vocab,
    linear_top_k,
    reference,
    sampled_loss,
    score_tokens,
    score_top_k,
    top_k_loss,
)

POWER = REWARDS["power"]


def difference(t: Tensor, p: Tensor) -> Tensor:
    """A reward that is computed in the dtype of its arguments."""
    return t.exp() - p.exp()


def told(case: Case, k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The teacher's k most probable ids and their log-probs."""
    log_probs, ids = reference.log_softmax(*case.teacher(torch.float64)).topk(k)
    return ids, log_probs.to(dtype)


def top_k(
    case: Case, k: int, reward: Any, dtype: torch.dtype = torch.float64, **options: Any
) -> list[Tensor]:
    hidden, head = case.leaves(dtype)
    loss = linear_top_k(
        hidden,
        head.weight,
        *told(case, k, dtype),
        reward,
        case.coefficient,
        **{"chunk_size": CHUNK, **options_of(head), **options},
    )
    return [loss.detach().double(), *gradients(loss, hidden, head)]


def oracle(case: Case, k: int, reward: Any) -> list[Tensor]:
    hidden, head = case.leaves(torch.float64)
    student, teacher = (
        reference.log_softmax(hidden, head),
        reference.log_softmax(*case.teacher(torch.float64)),
    )
    loss = reference.top_k(student, teacher, k, reward, case.coefficient.double())
    return [loss.detach(), *gradients(loss, hidden, head)]


@pytest.mark.parametrize("k", [1, 5, V - 1, V])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("n", [0, 1, 2 * CHUNK + 1])
def test_top_k_is_the_oracles(n: int, head: str, k: int) -> None:
    case = Case(n, torch.float64, head)
    got, exact = top_k(case, k, difference), oracle(case, k, difference)
    for g, e in zip(got[1:], exact[1:], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["power", "log_ratio"])
def test_top_k_is_its_naive_equivalent(name: str) -> None:
    """The lines of the docstring, and the divergence between the outcomes as its value."""
    case, reward = Case(13, torch.float64), REWARDS[name]
    ids, teacher = told(case, 6)
    hidden, head = case.leaves(torch.float64)
    p = reference.log_softmax(hidden, head).gather(1, ids)
    p = torch.cat([p, (1 - p.exp().sum(-1, keepdim=True)).log()], -1)
    t = torch.cat([teacher, (1 - teacher.exp().sum(-1, keepdim=True)).log()], -1)
    r = reward.compute(t, p.detach())
    loss = -(case.coefficient * (p.detach().exp() * r * p).sum(-1)).sum()
    expected = gradients(loss, hidden, head)
    got = top_k(case, 6, reward, value=reward.divergence)
    torch.testing.assert_close(
        got[0], (case.coefficient * reward.divergence(t, p.detach())).sum(), rtol=1e-6, atol=1e-6
    )
    for g, e in zip(got[1:], expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ids_are_the_full_vocabulary(dtype: torch.dtype, name: str) -> None:
    case, reward = Case(20, dtype), REWARDS[name]
    hidden, head = case.leaves(dtype)
    teacher_hidden, teacher = case.teacher(dtype)
    arguments = (teacher_hidden, teacher.weight, reward, case.coefficient)
    options = {"value": reward.divergence, "teacher_options": options_of(teacher)}
    loss = linear_full_vocab(hidden, head.weight, *arguments, **options)
    whole = [loss.detach().double(), *gradients(loss, hidden, head)]
    _, given = score_top_k(teacher_hidden, teacher, case.targets, V)
    hidden, head = case.leaves(dtype)
    loss = linear_top_k(
        hidden, head.weight, given.ids, given.log_probs, *arguments[2:], value=reward.divergence
    )
    for g, e in zip([loss.detach().double(), *gradients(loss, hidden, head)], whole, strict=True):
        assert error(g, e) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_an_id_that_the_student_lacks_is_an_outcome_without_probability() -> None:
    case = Case(9, torch.float64)
    hidden, head = case.leaves(torch.float64)
    ids, teacher = told(case, 5)
    lacks = ids[:, 1:3].flatten().unique()  # masked for the student, as an id of its own has it
    bias = torch.zeros(V, dtype=torch.float64).index_fill_(0, lacks, -torch.inf)
    arguments = (teacher, difference, case.coefficient)
    loss = linear_top_k(hidden, head.weight, ids, *arguments, bias=bias)
    masked = gradients(loss, hidden, Head(head.weight))
    gone = torch.where(torch.isin(ids, lacks), ids + V, ids)
    assert (gone >= V).any(1).all()
    loss = linear_top_k(hidden, head.weight, gone, *arguments, bias=bias)
    for g, e in zip(gradients(loss, hidden, Head(head.weight)), masked, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)
    none = torch.full_like(ids, -1)
    loss = linear_top_k(hidden, head.weight, none, *arguments)
    assert all(g.isfinite().all() for g in gradients(loss, hidden, head))


@settings(max_examples=30)
@given(
    st.integers(0, 10**6), st.integers(1, V - 1), st.sampled_from([0.5, 1.0, 5.0]),
    st.sampled_from([0.3, 1.0, 4.0]),
)  # fmt: skip
def test_the_bias_is_bounded_by_the_tails(seed: int, k: int, alpha: float, scale: float) -> None:
    """By the logits, and in the sum of absolute values: 2 P max |r_u - r(T, P)| over the tail.

    For power that is at most 2 P (T^alpha + P^alpha). The reverse KL of the outcomes is at most
    that of the ids.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, V, generator=generator, dtype=torch.float64)
    teacher, student = logits.log_softmax(-1)
    eye, one = torch.eye(V, dtype=torch.float64), torch.ones(1)
    log_probs, ids = teacher.topk(k)
    outside = torch.ones(V, dtype=torch.bool).index_fill_(0, ids, False)
    tail, teacher_tail = student[outside].exp().sum(), teacher[outside].exp().sum()

    def reward(t: Tensor, p: Tensor) -> Tensor:
        return (alpha * t).exp() - (alpha * p).exp()

    hidden = student[None].clone().requires_grad_()
    loss = linear_top_k(hidden, eye, ids[None], log_probs[None], reward, one)
    (short,) = torch.autograd.grad(loss, hidden)
    hidden = student[None].clone().requires_grad_()
    loss = linear_full_vocab(hidden, eye, teacher[None], eye, reward, one)
    (whole,) = torch.autograd.grad(loss, hidden)
    bias = (short - whole).abs().sum()
    floor = teacher_tail.clamp(min=1e-6)  # what a smaller tail of the teacher counts as
    in_tail = reward(teacher[outside], student[outside]) - reward(floor.log(), tail.log())
    assert bias <= 2 * tail * in_tail.abs().max() + 1e-12
    assert bias <= 2 * tail * (floor**alpha + tail**alpha) + 1e-12
    kl = (student.exp() * (student - teacher)).sum()
    parts = (student[~outside].exp() * (student - teacher)[~outside]).sum()
    assert parts + tail * (tail.log() - teacher_tail.log()) <= kl + 1e-12


def test_the_value_is_over_the_outcomes_and_the_statistics_are_the_tokens() -> None:
    case, k = Case(20, torch.float32), 4
    ids, log_probs = told(case, k, torch.float32)
    own = torch.linspace(-3, -1, 20)
    teacher = TeacherTopK(ids, log_probs, own, POWER)
    hidden, head = case.leaves(torch.float32)
    seen: list[Tensor] = []

    def coefficient(chunk: PairStatistics, tokens: slice) -> Tensor:
        seen.append(chunk.values.clone())
        return case.coefficient[tokens]

    inputs = (hidden, head, case.targets)
    plain, _ = sampled_loss(*inputs, lambda _, tokens: case.coefficient[tokens], chunk_size=CHUNK)
    plain_gradients = gradients(plain, hidden, head)
    loss, found = sampled_loss(*inputs, coefficient, teacher, chunk_size=CHUNK)
    for g, e in zip(gradients(loss, hidden, head), plain_gradients, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)
    student = reference.log_softmax(*case.leaves(torch.float64)).detach()
    p = student.gather(1, ids)
    p = torch.cat([p, (1 - p.exp().sum(1, keepdim=True)).log()], 1)
    t = log_probs.double()
    t = torch.cat([t, (1 - t.exp().sum(1, keepdim=True)).log()], 1)
    values = reference.values(t, p, POWER)
    torch.testing.assert_close(torch.cat(seen).double(), values, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat(seen), found.values)
    _, trained = top_k_loss(*inputs, teacher, 1.0, chunk_size=CHUNK)
    expected = score_tokens(*inputs)
    for statistics in (found, trained):
        torch.testing.assert_close(statistics.log_probs, expected.log_probs)
        torch.testing.assert_close(statistics.entropy, expected.entropy)
        assert torch.equal(statistics.top1, expected.top1)
        assert torch.equal(statistics.teacher_log_probs, own)
        torch.testing.assert_close(statistics.tail.double(), p[:, -1].exp(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            statistics.teacher_tail.double(), t[:, -1].exp(), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("name", ["power", "log_ratio"])
def test_an_almost_certain_student_has_an_exact_gradient(name: str) -> None:
    """Its other ids share 1e-7, where a reward less its mean has lost all digits if it is naive."""
    reward = rewards.create(name) if name == "log_ratio" else rewards.create("power", alpha=500.0)
    weight = torch.tensor([[9.0], [-7.0], [-7.5], [-8.0], [-8.5]])
    teacher = torch.tensor([[0.9, 0.04, 0.03, 0.02, 0.01]]).log()
    found = {}
    for dtype in (torch.float32, torch.float64):
        hidden = torch.ones(1, 1, dtype=dtype)
        own = weight.to(dtype).requires_grad_()

        def pointwise(t: Tensor, p: Tensor) -> Tensor:
            return reward.compute(t, p)

        given = (torch.arange(3)[None], teacher[:, :3].to(dtype))
        loss = linear_top_k(hidden, own, *given, pointwise, 1.0)
        (found[dtype],) = torch.autograd.grad(loss, own)
    torch.testing.assert_close(
        found[torch.float32].double(), found[torch.float64], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("name", ["clip", "power", "hellinger", "jensen_shannon"])
def test_impossible_ids_of_either_model_make_no_nan(name: str) -> None:
    hidden = torch.full((2, 1), 200.0, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.99], [0.2]], requires_grad=True)
    ids = torch.tensor([[3, 0], [-1, 2]])
    log_probs = torch.tensor([[0.0, -torch.inf], [-0.5, -1.0]])
    bias = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])
    reward = REWARDS[name]
    loss = linear_top_k(hidden, weight, ids, log_probs, reward, 1.0, bias=bias)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_scores_and_the_most_probable_ids_come_in_one_pass() -> None:
    case = Case(15, torch.float32, "capped")
    hidden, head = case.leaves(torch.float32)
    statistics, found = score_top_k(hidden, head, case.targets, 7, chunk_size=CHUNK)
    expected = score_tokens(hidden, head, case.targets)
    for got, wanted in zip(vars(statistics).values(), vars(expected).values(), strict=True):
        torch.testing.assert_close(got, wanted)
    log_probs, ids = reference.log_softmax(*case.leaves(torch.float64)).topk(7)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.log_probs.double(), log_probs.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.target_log_probs, statistics.log_probs)


def test_what_does_not_fit_is_refused() -> None:
    case = Case(4, torch.float32)
    ids, log_probs = told(case, 3, torch.float32)
    head, own = Head(case.weight), torch.zeros(4)
    for bad, message in (
        (TeacherTopK(ids, log_probs, own), "teacher reward: expected the reward"),
        (TeacherTopK(ids[:3], log_probs, own, POWER), r"expected \[4, k\] torch.int64"),
        (TeacherTopK(ids, log_probs[:, :2], own, POWER), r"and \[4, k\], got \[4, 3\]"),
        (TeacherTopK(ids.int(), log_probs, own, POWER), "torch.int32"),
        (TeacherTopK(ids, log_probs, own[:2], POWER), r"target_log_probs: expected \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            top_k_loss(case.hidden, head, case.targets, bad, 1.0)
    with pytest.raises(ValueError, match="k: expected 1 to 61, got 62"):
        score_top_k(case.hidden, head, case.targets, 62)
    good = TeacherTopK(ids, log_probs, own, POWER)
    with pytest.raises(ValueError, match="merged_ids: expected None"):
        sampled_loss(
            case.hidden, head, case.targets, lambda c, _: c.values, good, merged_ids=ids[0]
        )
