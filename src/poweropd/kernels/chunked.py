"""Log-probabilities and the policy gradient of sampled tokens, by chunks of tokens.

Logits exist for one chunk at a time, in one buffer. The gradient is formed right where the
logits are, so that nothing is kept for, or recomputed in, the backward pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd.kernels.baseline import ValueBaseline, check_teacher
from poweropd.kernels.gradient import HeadGradient
from poweropd.kernels.head import Buffer, Head, chunk_rows, chunks
from poweropd.kernels.softmax import (
    Actions,
    SoftmaxSummary,
    TokenStatistics,
    check_statistics,
    check_tokens,
    log_softmax_,
    softmax_,
    summary_of,
    unique_ids,
)
from poweropd.kernels.support import restrict_

# (student log-probs of a chunk [n] float32, which of the N tokens these are) -> [n]
Coefficient = Callable[[Tensor, slice], Tensor]


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    merged_ids: Tensor | None = None,
    statistics: TokenStatistics | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probabilities of targets under an LM head: [N] float32, no gradient. One head matmul.

    The naive equivalent::

        logits = scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap) / temperature
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    Args:
        hidden: [N, H], any float dtype.
        weight: [V, H], any float dtype; matmuls take it in that of `hidden`. `bias`: [V].
        targets: [N] int64 ids in [0, V).
        merged_ids: [M] int64. A target among them counts as the action "any of them", whose
            probability is their sum (semantic stop, arXiv:2609.20511).
        statistics: filled in place, if given.
        chunk_size: tokens per chunk; chosen for a fixed memory if None.

    Raises ValueError, with what was expected and got, for wrong shapes or dtypes.
    """
    head = Head(weight, bias, scale, softcap, temperature)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows = chunk_rows(hidden, head.vocab_size, 1, chunk_size)
        forward = _Forward(hidden, head, targets, rows, merged_ids, statistics)
        parts = [forward(tokens).log_probs for tokens in chunks(hidden.shape[0], rows)]
        return torch.cat([hidden.new_empty(0, dtype=torch.float32), *parts])


def linear_policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficient: Coefficient,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    merged_ids: Tensor | None = None,
    statistics: TokenStatistics | None = None,
    baseline: ValueBaseline | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """-sum_i sg[c_i] ln p_i(targets_i), a float32 scalar: PowerOPD's loss (arXiv:2606.17199).

    The naive equivalent, with `log_prob` that of `linear_log_prob` with a gradient::

        student_log_probs = log_prob(hidden, weight, targets, ...)
        c = coefficient(student_log_probs.detach(), slice(0, N))
        return -(c * student_log_probs).sum()

    Three head matmuls in all: logits, and the gradients of `hidden` and `weight`, formed in the
    forward. A token whose coefficient is exactly zero takes part in the first only. Can be
    backpropagated once.

    Args:
        hidden, weight, bias, targets, merged_ids, statistics, chunk_size, and the head's options:
            as in `linear_log_prob`. Gradients reach `hidden`, `weight` and `bias` where they
            require one, in their dtypes; they are summed over chunks in float32.
        coefficient: called once per chunk, in order, without gradient, with the student's
            log-probs [n] float32 and the slice of the N tokens they belong to; returns [n].
            Rewards, token weights and 1 / N are all in it.
        baseline: fills, chunk by chunk before `coefficient`, the value of each context and the
            teacher's log-prob of each target, for one more head matmul.

    Raises ValueError, with what was expected and got, for wrong shapes or dtypes.
    """
    head = Head(weight, bias, scale, softcap, temperature)
    head.check(hidden)
    gradient = HeadGradient.zeros(hidden, head)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        capped = softcap is not None and gradient.needed
        # The logits, the soft-cap's slope, and the teacher's logits.
        buffers = 1 + capped + (baseline is not None)
        rows = chunk_rows(hidden, head.vocab_size, buffers, chunk_size)
        forward = _Forward(hidden, gradient.head, targets, rows, merged_ids, statistics, baseline)
        slopes = Buffer(hidden, rows, head.vocab_size) if capped else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for tokens in chunks(hidden.shape[0], rows):
            slope = None if slopes is None else slopes.of(tokens)
            chunk = forward(tokens, slope)
            c = coefficient(chunk.log_probs, tokens)
            check_tokens("result of the coefficient", c, len(chunk.log_probs), None)
            loss -= torch.where(c == 0, 0.0, c * chunk.log_probs).sum()
            if gradient.needed:
                chunk.actions.subtract_from(chunk.probs)
                gradient.add(chunk.probs, slope, c, hidden, tokens)
    return gradient.attach(loss, hidden, head)


class _Chunk(NamedTuple):
    """Of n tokens."""

    log_probs: Tensor  # [n] float32
    probs: Tensor  # [n, V], in the buffer
    actions: Actions


class _Forward:
    """One head matmul per chunk: from hidden states to log-probs, probabilities, statistics."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        rows: int,
        merged_ids: Tensor | None,
        statistics: TokenStatistics | None,
        baseline: ValueBaseline | None = None,
    ) -> None:
        head.check(hidden)
        num_tokens, vocab_size = hidden.shape[0], head.vocab_size
        check_tokens("targets", targets, num_tokens, torch.int64)
        check_statistics(statistics, num_tokens)
        self.hidden, self.head, self.targets = hidden, head.prepared(hidden), targets
        self.merged_ids, self.statistics = unique_ids(merged_ids), statistics
        self.buffer = Buffer(hidden, rows, vocab_size)
        self.baseline = baseline
        if baseline is not None:
            check_teacher(baseline.hidden, baseline.head, baseline.targets, num_tokens, vocab_size)
            self.teacher_head = baseline.head.prepared(baseline.hidden)
            self.teacher_buffer = Buffer(baseline.hidden, rows, vocab_size)

    def __call__(self, tokens: slice, slope: Tensor | None = None) -> _Chunk:
        logits = self.head.logits(self.hidden[tokens], self.buffer.of(tokens), slope)
        actions, summary = self._softmax_(logits, tokens)
        log_probs = summary.log_probs(actions.log_weights).float()
        if self.statistics is not None:
            self.statistics.record(tokens, log_probs, actions, summary)
            if self.baseline is not None:
                self.statistics.teacher_log_probs[tokens] = self.baseline.teacher_log_probs[tokens]
        return _Chunk(log_probs, logits, actions)

    def _softmax_(self, logits: Tensor, tokens: slice) -> tuple[Actions, SoftmaxSummary]:
        """Logits become probabilities; on the way the baseline sees log-probabilities."""
        targets = self.targets[tokens]
        if self.baseline is None:
            actions = Actions.of(logits, targets, self.merged_ids)
            return actions, softmax_(logits, self.statistics is not None)
        log_softmax_(logits)
        outside = self._restrict_(logits, tokens)
        actions = Actions.of(logits, targets, self.merged_ids)
        summary = summary_of(logits)
        buffer = self.teacher_buffer.of(tokens)
        self.baseline.fill(
            tokens, logits, targets, self.teacher_head, buffer, self.merged_ids, outside
        )
        logits.exp_()
        return actions, summary

    def _restrict_(self, log_probs: Tensor, tokens: slice) -> Tensor | None:
        """Log-probabilities become those over the support; [n, V] what is outside it."""
        if self.baseline is None or self.baseline.support is None:
            return None
        outside = self.baseline.support.outside(log_probs, self.targets[tokens])
        log_mass = restrict_(log_probs, outside)
        if self.statistics is not None:
            self.statistics.log_support[tokens] = log_mass.float()
        return outside
