"""The exact expectation of sampled distillation over the vocabulary, by chunks of tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poweropd.kernels.baseline import RewardFunction, check_teacher, rewards_of
from poweropd.kernels.gradient import HeadGradient
from poweropd.kernels.head import Buffer, Head, chunk_rows, chunks
from poweropd.kernels.softmax import (
    Actions,
    TokenStatistics,
    check_statistics,
    check_tokens,
    expectation,
    log_softmax_,
    merge_,
    spare_tile,
    summary_of,
    tiles,
    unique_ids,
    unmerge_,
)
from poweropd.kernels.support import Support, restrict_

# (teacher log-probs, student log-probs), both [n, V] (or [n, k]) -> [n]
Value = Callable[[Tensor, Tensor], Tensor]


def linear_full_vocab(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    reward: RewardFunction,
    token_weight: Tensor | float,
    *,
    value: Value | None = None,
    top_k: int | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    teacher_options: Mapping[str, Any] | None = None,
    merged_ids: Tensor | None = None,
    support: Support | None = None,
    targets: Tensor | None = None,
    teacher_targets: Tensor | None = None,
    statistics: TokenStatistics | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Full-vocabulary distillation with any pointwise reward r(t, p): a float32 scalar loss.

    Its gradient is -sum_i w_i sum_v sg[p_v r(t_v, p_v)] grad ln p_v, which is the expected
    gradient of the sampled loss (PowerOPD, arXiv:2606.17199) over the student's own next token.
    By the logits it is -w p_u (r_u - sum_v p_v r_v). Its value is sum_i w_i D_i, with
    D = value(...) where given, else -sum_v p_v r_v, which for r = ln t - ln p is the reverse KL.
    The naive equivalent, up to that value::

        student = log_softmax(head(hidden)); teacher = log_softmax(teacher_head(teacher_hidden))
        r = reward(teacher, student.detach())                            # [N, V]
        per_token = (student.detach().exp() * r * student).sum(-1)
        return -(token_weight * per_token).sum()

    With `top_k` both sums over v run over S, the student's k most probable ids, only, with p and
    t still softmaxes over the whole vocabulary. By the logits the gradient is then
    -w p_u ([u in S] r_u - sum_{v in S} p_v r_v), and `value` sees [n, k] log-probs.

    Four head matmuls: both logits, and the gradients of `hidden` and `weight`, formed in the
    forward. A token of weight zero takes no part in the latter. Can be backpropagated once.

    Args:
        hidden [N, H], weight [V, H], bias [V], scale, softcap, temperature, merged_ids,
            chunk_size: the student's, as in `linear_policy_gradient`. Merged ids are one action
            on both sides: to `reward` the smallest of them has their summed probability, and the
            others have none (about -1e30).
        teacher_hidden [N, H_teacher], teacher_weight [V, H_teacher]: no gradient reaches them.
        teacher_options: the teacher's bias, scale, softcap and temperature (`Head.options`).
        reward: (teacher log-probs, student log-probs), [n, V] float32 each -> [n, V] float32,
            without gradient. Pointwise: called on a few rows at a time, which it must not change.
        token_weight: [N], or one number for all.
        support: both softmaxes are over these ids and the target, renormalised.
        targets: [N] int64, with `statistics`: tokens whose log-probs are to be reported;
            `teacher_targets` where the teacher's differ.

    Raises ValueError, with what was expected and got, for wrong shapes or dtypes, and for
    vocabularies of different sizes: slice the weights to the ids that both models have.
    """
    head = Head(weight, bias, scale, softcap, temperature)
    teacher_head = Head(teacher_weight, **(teacher_options or {}))
    num_tokens, vocab_size = hidden.shape[0], head.vocab_size
    head.check(hidden)
    check_teacher(teacher_hidden, teacher_head, teacher_targets, num_tokens, vocab_size)
    weights = _token_weights(token_weight, hidden)
    reporter = _Reporter.make(statistics, targets, teacher_targets, num_tokens)
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k: expected 1 to {vocab_size}, got {top_k}")
    if support is not None and reporter is None:
        raise ValueError("statistics: expected them, and targets, beside a support, got None")
    step = _dense if top_k is None else partial(_on_top_k, top_k)

    gradient = HeadGradient.zeros(hidden, head)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        merged = unique_ids(merged_ids)
        capped = softcap is not None and gradient.needed
        # Both logits, and the soft-cap's slope.
        rows = chunk_rows(hidden, vocab_size, 2 + capped, chunk_size)
        prepared, teacher_prepared = gradient.head, teacher_head.prepared(teacher_hidden)
        buffer, teacher_buffer = (Buffer(h, rows, vocab_size) for h in (hidden, teacher_hidden))
        slopes = Buffer(hidden, rows, vocab_size) if capped else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for tokens in chunks(num_tokens, rows):
            slope = None if slopes is None else slopes.of(tokens)
            student = prepared.logits(hidden[tokens], buffer.of(tokens), slope)
            teacher = teacher_prepared.logits(teacher_hidden[tokens], teacher_buffer.of(tokens))
            log_softmax_(student)
            log_softmax_(teacher)
            if reporter is not None:
                if support is not None:
                    reporter.restrict_(tokens, student, teacher, support)
                reporter(tokens, student, teacher, merged)
            shares = merge_(student, merged)
            merge_(teacher, merged)
            divergence = step(teacher, student, reward, value)  # `student` is d_logits from here
            unmerge_(student, merged, shares)
            w = weights[tokens]
            loss += torch.where(w == 0, 0.0, w * divergence).sum()
            if gradient.needed:
                gradient.add(student, slope, w, hidden, tokens)
    return gradient.attach(loss, hidden, head)


def _dense(teacher: Tensor, student: Tensor, reward: RewardFunction, value: Value | None) -> Tensor:
    """Student's log-probs [n, V] become -p (r - sum_v p_v r_v); returns the divergence [n]."""
    divergences = student.new_empty(student.shape[0])
    spare = spare_tile(student)
    # By tiles, so that whatever the reward makes on its way is small, and, on a CPU, in cache.
    for rows in tiles(student):
        t, log_probs = teacher[rows], student[rows]
        r = rewards_of(reward, t, log_probs)
        if value is not None:
            divergences[rows] = value(t, log_probs)
        probs = log_probs.exp()
        expected, advantage = expectation(probs, r, spare[: rows.stop - rows.start])
        if value is None:
            divergences[rows] = -expected
        torch.mul(probs, advantage, out=log_probs).neg_()
    return divergences


def _on_top_k(
    k: int, teacher: Tensor, student: Tensor, reward: RewardFunction, value: Value | None
) -> Tensor:
    """Student's log-probs [n, V] become -p ([v in S] r - sum over S of p r); the divergence [n]."""
    support = student.topk(k, dim=1, sorted=False).indices
    t, p = teacher.gather(1, support), student.gather(1, support)  # [n, k]
    divergence = None if value is None else value(t, p)
    weighted = p.exp() * rewards_of(reward, t, p)
    expected = weighted.sum(1)
    student.exp_().mul_(expected[:, None]).scatter_add_(1, support, -weighted)
    return -expected if divergence is None else divergence


def _token_weights(token_weight: Tensor | float, hidden: Tensor) -> Tensor:
    """[N] float32."""
    weights = torch.as_tensor(token_weight, dtype=torch.float32, device=hidden.device).detach()
    weights = weights.expand(hidden.shape[0]) if weights.ndim == 0 else weights
    check_tokens("token_weight", weights, hidden.shape[0], None)
    return weights


@dataclass(frozen=True)
class _Reporter:
    """Fills the statistics of sampled tokens, which take no part in the loss."""

    statistics: TokenStatistics
    targets: Tensor
    teacher_targets: Tensor

    @classmethod
    def make(
        cls,
        statistics: TokenStatistics | None,
        targets: Tensor | None,
        teacher_targets: Tensor | None,
        num_tokens: int,
    ) -> "_Reporter | None":
        if statistics is None:
            return None
        if targets is None:
            raise ValueError("targets: expected [N] torch.int64 beside statistics, got None")
        check_statistics(statistics, num_tokens)
        check_tokens("targets", targets, num_tokens, torch.int64)
        return cls(statistics, targets, targets if teacher_targets is None else teacher_targets)

    def restrict_(self, tokens: slice, student: Tensor, teacher: Tensor, support: Support) -> None:
        """Both models' log-probs [n, V] become those over the student's support."""
        outside = support.outside(student, self.targets[tokens])
        self.statistics.log_support[tokens] = restrict_(student, outside).float()
        restrict_(teacher, outside)

    def __call__(
        self,
        tokens: slice,
        student: Tensor,
        teacher: Tensor,
        merged_ids: Tensor | None,
    ) -> None:
        """From both models' log-probs [n, V]."""
        actions = Actions.of(student, self.targets[tokens], merged_ids)
        self.statistics.record(tokens, actions.log_weights.float(), actions, summary_of(student))
        of_teacher = Actions.of(teacher, self.teacher_targets[tokens], merged_ids)
        self.statistics.teacher_log_probs[tokens] = of_teacher.log_weights.float()
