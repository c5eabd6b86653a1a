"""The sampled objective."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.errors import UsageError
from poweropd.kernels import Head, Support, TokenStatistics, ValueBaseline, linear_policy_gradient
from poweropd.objectives.base import TokenRecord, sampler_log_ratios, token_record
from poweropd.rewards import Reward

# Above this an importance weight is cut off.
MAX_IMPORTANCE_WEIGHT = 2.0


@dataclass(frozen=True)
class Sampled:
    """-sum over trained tokens of token_weight * sg[w (r(t, p) + bonus - V)] * ln p.

    That is arXiv:2606.17199 where the importance weights w are 1, the bonus and the baseline's
    values V are 0. The teacher's log-probs come with the batch, or, with a `teacher_head`, from
    its hidden states; `baseline`, `merged_ids` and `support` need the latter.
    """

    reward: Reward
    token_weight: float
    teacher_head: Head | None = None
    baseline: bool = False
    correction: bool = False
    merged_ids: Tensor | None = None
    support: Support | None = None

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch
    ) -> tuple[Tensor, TokenRecord]:
        teacher = self._teacher(batch)
        if teacher is None:
            assert batch.teacher_log_probs is not None, "the examples have not been scored"
            teacher_log_probs = batch.teacher_log_probs
            values = torch.zeros_like(teacher_log_probs)
        else:
            teacher_log_probs, values = teacher.teacher_log_probs, teacher.values
        statistics = TokenStatistics.empty(len(values), values.device)
        rewards, weights = torch.empty_like(values), torch.ones_like(values)

        def coefficient(student_log_probs: Tensor, tokens: slice) -> Tensor:
            rewards[tokens] = self.reward(teacher_log_probs[tokens], student_log_probs)
            if self.correction:
                weights[tokens] = self._weights(batch, statistics, tokens)
            advantages = rewards[tokens] + batch.task_reward[tokens] - values[tokens]
            return self.token_weight * weights[tokens] * advantages

        loss = linear_policy_gradient(
            hidden_states,
            head.weight,
            batch.student.targets,
            coefficient,
            merged_ids=self.merged_ids,
            statistics=statistics,
            baseline=teacher,
            **head.options,
        )
        statistics.teacher_log_probs.copy_(teacher_log_probs)
        return loss, token_record(batch, rewards, statistics, self.merged_ids, weights)

    def _teacher(self, batch: Batch) -> ValueBaseline | None:
        if self.teacher_head is None:
            return None
        assert batch.teacher_hidden is not None, "the teacher has not read this batch"
        return ValueBaseline(
            batch.teacher_hidden,
            self.teacher_head,
            self.reward if self.baseline else None,
            batch.teacher.targets,
            self.support,
        )

    def _weights(self, batch: Batch, statistics: TokenStatistics, tokens: slice) -> Tensor:
        """min(p_student / p_sampler, MAX_IMPORTANCE_WEIGHT); 1 where that is not known."""
        if batch.sampling_log_probs is None:
            raise UsageError(
                "rollout.correction: truncated needs the sampler's log-probs, and the engine gave "
                "none with its completions: set rollout.correction=none"
            )
        ratios = sampler_log_ratios(batch, statistics, self.merged_ids)[tokens]
        return ratios.exp().clamp(max=MAX_IMPORTANCE_WEIGHT).nan_to_num(nan=1.0)
