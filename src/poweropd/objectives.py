"""Objectives: what the student's head computes on the N hidden states of a micro-batch.

An objective is called inside the student's forward with hidden states, head and batch. It closes
over the reward and the weight of one token (1 / N, times the number of processes), builds the
coefficient for the kernel, and records per token what the run reports.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from poweropd.batching import Batch
from poweropd.kernels import (
    TokenStatistics,
    linear_policy_gradient,
)
from poweropd.rewards import Reward


@dataclass(frozen=True)
class Head:
    """An LM head: logits = softcap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}


@dataclass(frozen=True)
class TokenRecord:
    """What is known of each trained token, [N] float32 each, without a gradient."""

    positions: Tensor  # in the completion
    rewards: Tensor
    student_log_probs: Tensor
    teacher_log_probs: Tensor
    entropy: Tensor  # of the student, nats

    @classmethod
    def cat(cls, records: Sequence["TokenRecord"]) -> "TokenRecord":
        """One record, on the CPU."""
        columns = zip(*(vars(r).values() for r in records), strict=True)
        return cls(*(torch.cat([part.cpu() for part in column]) for column in columns))


class Objective(Protocol):
    """(hidden_states [N, H], head, batch) -> loss of the micro-batch and its token record."""

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch
    ) -> tuple[Tensor, TokenRecord]: ...


@dataclass(frozen=True)
class Sampled:
    """-sum over trained tokens of token_weight * sg[r(t, p)] * ln p (PowerOPD, eq. of the loss)."""

    reward: Reward
    token_weight: float

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch
    ) -> tuple[Tensor, TokenRecord]:
        assert batch.teacher_log_probs is not None, "the examples have not been scored"
        teacher_log_probs = batch.teacher_log_probs
        student_log_probs = torch.empty_like(teacher_log_probs)
        rewards = torch.empty_like(teacher_log_probs)

        def coefficient(log_probs: Tensor, tokens: slice) -> Tensor:
            student_log_probs[tokens] = log_probs
            rewards[tokens] = self.reward(teacher_log_probs[tokens], log_probs)
            return rewards[tokens] * self.token_weight

        statistics = TokenStatistics.empty(len(rewards), rewards.device)
        loss = linear_policy_gradient(
            hidden_states,
            head.weight,
            batch.student.targets,
            coefficient,
            statistics=statistics,
            **head.options,
        )
        record = TokenRecord(
            batch.positions, rewards, student_log_probs, teacher_log_probs, statistics.entropy
        )
        return loss, record


@dataclass(frozen=True)
class FullVocab:
    """The exact expectation of `Sampled` over the student's next token, for any pointwise reward.

    Its value is the reward's divergence; for the log ratio that is the reverse KL.
    """

    reward: Reward
    token_weight: float
    teacher_head: Head

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch
    ) -> tuple[Tensor, TokenRecord]:
        raise AssertionError


MakeObjective = Callable[[Reward, float], Objective]


def maker(kind: str, teacher_head: Head) -> MakeObjective:
    """How to make the objective `kind` from a step's reward and token weight."""
    makers: dict[str, MakeObjective] = {
        "sampled": Sampled,
        "full_vocab": lambda reward, weight: FullVocab(reward, weight, teacher_head),
    }
    return makers[kind]
