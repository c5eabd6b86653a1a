"""Objectives: what the student's head computes on the N hidden states of a micro-batch.

An objective is called inside the student's forward with hidden states, head and batch. It closes
over the reward and the weight of one token (1 / N, times the number of processes), builds the
coefficient for the kernel, and records per token what the run reports.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from poweropd.batching import Batch
from poweropd.kernels import (
    Head,
    TokenStatistics,
    linear_full_vocab,
    linear_policy_gradient,
)
from poweropd.rewards import Reward


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
    """-sum over trained tokens of token_weight * sg[r(t, p)] * ln p (arXiv:2606.17199)."""

    reward: Reward
    token_weight: float

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch
    ) -> tuple[Tensor, TokenRecord]:
        assert batch.teacher_log_probs is not None, "the examples have not been scored"
        teacher_log_probs = batch.teacher_log_probs
        rewards = torch.empty_like(teacher_log_probs)

        def coefficient(student_log_probs: Tensor, tokens: slice) -> Tensor:
            rewards[tokens] = self.reward(teacher_log_probs[tokens], student_log_probs)
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
        statistics.teacher_log_probs.copy_(teacher_log_probs)
        return loss, _record(batch, rewards, statistics)


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
        assert batch.teacher_hidden is not None, "the teacher has not read this batch"
        statistics = TokenStatistics.empty(len(batch.positions), hidden_states.device)
        loss = linear_full_vocab(
            hidden_states,
            head.weight,
            batch.teacher_hidden,
            self.teacher_head.weight,
            self.reward,
            self.token_weight,
            value=self.reward.divergence,
            teacher_options=self.teacher_head.options,
            targets=batch.student.targets,
            teacher_targets=batch.teacher.targets,
            statistics=statistics,
            **head.options,
        )
        rewards = self.reward(statistics.teacher_log_probs, statistics.student_log_probs)
        return loss, _record(batch, rewards, statistics)


def _record(batch: Batch, rewards: Tensor, statistics: TokenStatistics) -> TokenRecord:
    return TokenRecord(
        positions=batch.positions,
        rewards=rewards,
        student_log_probs=statistics.student_log_probs,
        teacher_log_probs=statistics.teacher_log_probs,
        entropy=statistics.entropy,
    )


MakeObjective = Callable[[Reward, float], Objective]


def maker(kind: str, teacher_head: Head) -> MakeObjective:
    """How to make the objective `kind` from a step's reward and token weight."""
    makers: dict[str, MakeObjective] = {
        "sampled": Sampled,
        "full_vocab": lambda reward, weight: FullVocab(reward, weight, teacher_head),
    }
    return makers[kind]
