"""The oracle: what the kernels compute, in plain differentiable torch over whole tensors.

Everything is computed in the dtype given (tests use float64); gradients come from autograd.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from poweropd.kernels.head import LOWEST, Head


def logits(hidden: Tensor, head: Head) -> Tensor:
    """Returns the logits [N, V]."""
    x = hidden @ head.weight.T
    if head.bias is not None:
        x = x + head.bias
    x = head.scale * x
    if head.softcap is not None:
        x = head.softcap * torch.tanh(x / head.softcap)
        if head.bias is not None:
            x = x.masked_fill(head.bias == -torch.inf, -torch.inf)
    return x / head.temperature


def log_softmax(hidden: Tensor, head: Head, merged_ids: Tensor | None = None) -> Tensor:
    """Returns the log-probs [N, A] of actions.

    These are the V ids or, with `merged_ids`, all other ids and then "any merged id".
    """
    log_probs = logits(hidden, head).log_softmax(-1)
    if merged_ids is None:
        return log_probs
    others = torch.ones(log_probs.shape[1], dtype=torch.bool)
    others[merged_ids] = False
    merged = log_probs[:, ~others].logsumexp(-1, keepdim=True)
    return torch.cat([log_probs[:, others], merged], dim=-1)


def log_prob(
    hidden: Tensor, head: Head, targets: Tensor, merged_ids: Tensor | None = None
) -> Tensor:
    """Returns ln p [N] of the targets, or of "any merged id" if the target is one of them."""
    log_probs = logits(hidden, head).log_softmax(-1)
    own = log_probs.gather(1, targets[:, None]).squeeze(1)
    if merged_ids is None:
        return own
    merged = log_probs[:, merged_ids.unique()].logsumexp(-1)
    return torch.where(torch.isin(targets, merged_ids), merged, own)


def policy_gradient(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    coefficient: Callable[[Tensor], Tensor],
    merged_ids: Tensor | None = None,
) -> Tensor:
    """Returns -sum_i sg[c_i] ln p_i (PowerOPD, arXiv:2606.17199)."""
    student_log_probs = log_prob(hidden, head, targets, merged_ids)
    return -(coefficient(student_log_probs.detach()).detach() * student_log_probs).sum()


def values(teacher: Tensor, student: Tensor, reward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Returns V(c) = sum_v p_v r(t_v, p_v) [N], from log-probs [N, V]."""
    return (student.exp() * reward(teacher, student)).sum(-1)


def full_vocab(
    student: Tensor,
    teacher: Tensor,
    reward: Callable[[Tensor, Tensor], Tensor],
    token_weight: Tensor,
    top_k: int | None = None,
) -> Tensor:
    """Returns -sum_i w_i sum_{v in S_i} sg[p_v r(t_v, p_v)] ln p_v, from log-probs [N, V].

    S_i is the vocabulary, or the student's `top_k` most probable ids. Only the gradient is that
    of `linear_full_vocab`; the value reported there is another.
    """
    if top_k is not None:
        support = student.topk(top_k, dim=-1).indices
        student, teacher = student.gather(-1, support), teacher.gather(-1, support)
    p = student.detach()
    return -(token_weight[:, None] * p.exp() * reward(teacher, p) * student).sum()


def top_k(
    student: Tensor,
    teacher: Tensor,
    k: int,
    reward: Callable[[Tensor, Tensor], Tensor],
    token_weight: Tensor,
) -> Tensor:
    """Returns the loss of `full_vocab` over k + 1 outcomes, from log-probs [N, V].

    These are the teacher's k most probable ids and "any other id", whose t counts as at least 1e-6.
    Only the gradient is that of `linear_top_k`; the value reported there is another.
    """
    ids = teacher.topk(k, dim=-1).indices
    inside = torch.zeros_like(student, dtype=torch.bool).scatter_(-1, ids, True)

    def outcomes(log_probs: Tensor) -> Tensor:
        rest = log_probs.masked_fill(inside, LOWEST).logsumexp(-1, keepdim=True)
        return torch.cat([log_probs.gather(-1, ids), rest], dim=-1)

    whole = outcomes(teacher)
    whole[:, -1].clamp_(min=math.log(1e-6))
    return full_vocab(outcomes(student), whole, reward, token_weight)


def entropy(log_probs: Tensor) -> Tensor:
    """Returns -sum_v p_v ln p_v [N]."""
    return -torch.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)


def support(log_probs: Tensor, top_k: int, top_p: float, temperature: float) -> Tensor:
    """Returns [N, V] bool: what top-k, then top-p keep of log-probs [N, V], token by token."""
    kept = torch.zeros_like(log_probs, dtype=torch.bool)
    for token, logits in enumerate(log_probs / temperature):
        order = logits.argsort(descending=True)[: top_k or None]
        before = logits[order].softmax(0).cumsum(0).roll(1)  # probability of those more probable
        before[0] = 0.0
        kept[token, order[before < top_p]] = True
    return kept


def truncated(log_probs: Tensor, kept: Tensor) -> Tensor:
    """Returns the log-probs [N, V] over the kept ids; those of the others are about -1e30."""
    return log_probs.masked_fill(~kept, LOWEST).log_softmax(-1)
