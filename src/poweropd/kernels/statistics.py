"""What the kernels return beside a loss: statistics of every token."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from poweropd.kernels.softmax import Actions, SoftmaxSummary

_UNKNOWN = {"top1": False, "log_support": 0.0, "values": 0.0}  # all others are NaN


@dataclass(frozen=True)
class TokenStatistics:
    """One model's statistics of N targets: [N] each, without a gradient."""

    log_probs: Tensor  # float32, ln p of the target, or of the action "any merged id"
    entropy: Tensor  # float32, nats: -sum_v p_v ln p_v; NaN if it was not asked for
    top1: Tensor  # bool: no id has a larger logit than the target
    log_support: Tensor  # float32, ln of the probability of the support; 0 without a support

    @classmethod
    def empty(cls, n: int, device: torch.device | str = "cpu") -> Self:
        """Returns statistics of `n` tokens of which nothing is known yet."""
        values = (_UNKNOWN.get(field.name, torch.nan) for field in fields(cls))
        return cls(*(torch.full((n,), value, device=device) for value in values))

    def of(self, tokens: slice) -> Self:
        """Returns views of the statistics of some tokens."""
        return type(self)(*(column[tokens] for column in vars(self).values()))

    def record(
        self, tokens: slice, log_probs: Tensor, actions: Actions, summary: SoftmaxSummary
    ) -> None:
        """Writes what is known of a chunk, before a kernel returns the whole."""
        self.log_probs[tokens] = log_probs
        self.entropy[tokens] = summary.entropy
        self.top1[tokens] = actions.largest >= summary.largest


@dataclass(frozen=True)
class PairStatistics(TokenStatistics):
    """The student's statistics of N targets, and what the teacher's head adds to them."""

    teacher_log_probs: Tensor  # float32, ln t of the teacher's target; NaN without its head
    values: Tensor  # float32, V(c) of the context, for a sampled loss with a reward; else 0
    tail: Tensor  # float32, the student's probability of all ids but the teacher's k; or NaN
    teacher_tail: Tensor  # float32, the teacher's; NaN unless its k most probable ids were given
