"""Truncated support: what it holds, and both kernels over it against the float64 oracle."""

from typing import Any

import pytest
import torch
from kernel_cases import CHUNK, HEADS, MERGED, Case, V, gradients
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from poweropd.kernels import (
    Head,
    Support,
    TeacherHead,
    full_vocab_loss,
    reference,
    sampled_loss,
)

SETTINGS = [(5, 1.0, 1.0), (0, 0.7, 1.0), (20, 0.9, 0.6), (200, 0.5, 2.0), (1, 0.1, 1.0)]


def power(t: Tensor, p: Tensor) -> Tensor:
    return t.exp() - p.exp()


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), SETTINGS)
@pytest.mark.parametrize("ties", [False, True])
def test_support_is_what_the_samplers_warpers_keep(
    top_k: int, top_p: float, temperature: float, ties: bool
) -> None:
    logits = 3 * torch.randn(200, V, generator=torch.Generator().manual_seed(0))
    logits = logits.round() if ties else logits
    scores = logits / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    kept = Support(top_k, top_p, temperature).contains(logits.log_softmax(1))
    if ties:  # which of equal logits at the nucleus's edge stay is not defined, but how many is
        assert torch.equal(kept.sum(1), scores.isfinite().sum(1))
        return
    assert torch.equal(kept, scores.isfinite())
    assert torch.equal(kept, reference.support(logits, top_k, top_p, temperature))


def truncated(
    case: Case, head_name: str, top: tuple[int, float, float], merged_ids: Tensor | None
) -> tuple[Any, ...]:
    """Leaves, and both models' float64 log-probs over the student's support, [N, V] each."""
    hidden, head = case.leaves(torch.float64)
    student = reference.log_softmax(hidden, head)
    teacher = reference.log_softmax(*case.teacher(torch.float64))
    kept = reference.support(student.detach(), *top).scatter(1, case.targets[:, None], True)
    return hidden, head, *(reference.truncated(x, kept) for x in (student, teacher)), kept


def merge(log_probs: Tensor, merged_ids: Tensor | None) -> Tensor:
    """[N, V]: the summed probability at each of the merged ids."""
    if merged_ids is None:
        return log_probs
    ids = merged_ids.unique()
    total = log_probs[:, ids].logsumexp(1, keepdim=True)
    return log_probs.index_copy(1, ids, total.expand(-1, len(ids)))


@pytest.mark.parametrize("merged_ids", [None, MERGED], ids=["single", "merged"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("top", SETTINGS[:3])
def test_policy_gradient_over_a_support(
    head: str, top: tuple[int, float, float], merged_ids: Tensor | None
) -> None:
    case = Case(2 * CHUNK + 1, torch.float64, head)
    hidden, its_head, student, teacher, kept = truncated(case, head, top, merged_ids)
    own, other = (
        merge(x, merged_ids).gather(1, case.targets[:, None])[:, 0] for x in (student, teacher)
    )
    c = case.coefficient.double() * power(other, own.detach())
    exact = gradients(-(c * own).sum(), hidden, its_head)

    hidden, its_head = case.leaves(torch.float64)
    teacher_hidden, teacher_head = case.teacher(torch.float64)
    loss, statistics = sampled_loss(
        hidden,
        its_head,
        case.targets,
        lambda c, tokens: case.coefficient[tokens] * power(c.teacher_log_probs, c.log_probs),
        TeacherHead(teacher_hidden, teacher_head, support=Support(*top)),
        merged_ids=merged_ids,
        chunk_size=CHUNK,
    )
    for g, e in zip(gradients(loss, hidden, its_head), exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.log_probs.double(), own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.teacher_log_probs.double(), other, rtol=1e-5, atol=1e-6)
    everything = reference.log_softmax(hidden, its_head)
    mass = everything.masked_fill(~kept, -torch.inf).logsumexp(1)
    torch.testing.assert_close(statistics.log_support.double(), mass, rtol=1e-5, atol=1e-6)
    assert not statistics.values.any()  # without a reward there are no values


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("top", SETTINGS[:3])
def test_full_vocabulary_over_a_support(head: str, top: tuple[int, float, float]) -> None:
    case = Case(2 * CHUNK + 1, torch.float64, head)
    hidden, its_head, student, teacher, kept = truncated(case, head, top, None)
    p = student.detach().exp()
    terms = torch.where(kept, p * power(teacher, student.detach()) * student, 0.0)
    exact = gradients(-(case.coefficient.double() * terms.sum(1)).sum(), hidden, its_head)
    expected = -torch.where(kept, p * power(teacher, student), 0.0).sum(1)
    value = (case.coefficient.double() * expected).sum().float()

    hidden, its_head = case.leaves(torch.float64)
    teacher_hidden, teacher_head = case.teacher(torch.float64)
    reads = TeacherHead(teacher_hidden, teacher_head, reward=power, support=Support(*top))
    loss, statistics = full_vocab_loss(
        hidden, its_head, case.targets, reads, case.coefficient, chunk_size=CHUNK
    )
    for got, whole in ((statistics.log_probs, student), (statistics.teacher_log_probs, teacher)):
        own = whole.gather(1, case.targets[:, None])[:, 0]
        torch.testing.assert_close(got.double(), own.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, value, rtol=1e-5, atol=1e-5)
    for g, e in zip(gradients(loss, hidden, its_head), exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)


def test_a_support_needs_targets() -> None:
    case = Case(4, torch.float32)
    head, support = Head(case.teacher_weight), Support(top_k=3)
    teacher = TeacherHead(case.teacher_hidden, head, reward=power, support=support)
    with pytest.raises(ValueError, match=r"targets: expected \[N\] torch.int64 beside a support"):
        full_vocab_loss(case.hidden, Head(case.weight), None, teacher, 1.0)
