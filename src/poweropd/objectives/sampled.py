"""The sampled objective."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.data.rollout import span_totals
from poweropd.errors import UsageError
from poweropd.kernels import (
    Head,
    PairStatistics,
    Support,
    TeacherHead,
    TeacherTopK,
    sampled_loss,
)
from poweropd.objectives.base import (
    Objective,
    TokenRecord,
    factors,
    sampler_log_ratios,
    teacher_of,
    token_record,
    top_k_of,
    with_reference,
)
from poweropd.objectives.spans import SpanScores
from poweropd.rewards import Reward

# Above this an importance weight is cut off.
MAX_IMPORTANCE_WEIGHT = 2.0


@dataclass(frozen=True)
class Sampled(Objective):
    """-sum over trained tokens of token_weight * sg[w (r(t, p) + bonus - V)] * ln p.

    That is arXiv:2606.17199 if the importance weights w are 1, and the bonus and the baseline's
    values V are 0. The teacher's log-probs come with the batch or, with a `teacher_head`, from its
    hidden states; `merged_ids` and `support` need the latter. Without it, the `baseline` is over
    the teacher's k most probable ids, which come with the batch, and one outcome for all others.
    `correction` weights every token, `off_policy` those of completions from a file. In a batch with
    spans r and w are those of the span that a token belongs to.
    """

    teacher_head: Head | None = None
    baseline: bool = False
    correction: bool = False
    off_policy: bool = False
    merged_ids: Tensor | None = None
    support: Support | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        head: Head,
        batch: Batch,
        reward: Reward,
        token_weight: Tensor | float,
    ) -> tuple[Tensor, TokenRecord]:
        """Returns the loss of a micro-batch, and the record of its trained tokens."""
        teacher: TeacherHead | TeacherTopK | None = None
        scored, baseline = batch.teacher_log_probs, reward if self.baseline else None
        if self.teacher_head is not None:
            teacher, scored = teacher_of(batch, self.teacher_head, baseline, self.support), None
        else:
            assert scored is not None, "the examples have not been scored"
            teacher = None if baseline is None else top_k_of(batch, baseline)
        rewards = torch.empty_like(batch.task_reward, dtype=torch.float32)
        weights = torch.ones_like(rewards)
        token_weights = factors(token_weight, batch)
        spans = None if batch.spans is None else SpanScores.of(hidden_states, head, batch)

        def coefficient(chunk: PairStatistics, tokens: slice) -> Tensor:
            if spans is not None:
                chunk = replace(chunk, log_probs=spans.of_spans(chunk.log_probs, tokens))
            teacher_log_probs = chunk.teacher_log_probs if scored is None else scored[tokens]
            of_tokens = with_reference(reward, batch, tokens)
            rewards[tokens] = of_tokens(teacher_log_probs, chunk.log_probs)
            if self.correction or self.off_policy:
                weights[tokens] = self._weights(batch, chunk, tokens)
            advantages = rewards[tokens] + batch.task_reward[tokens] - chunk.values
            return token_weights[tokens] * weights[tokens] * advantages

        targets, merged_ids = batch.student.targets, self.merged_ids
        loss, statistics = sampled_loss(
            hidden_states, head, targets, coefficient, teacher, merged_ids=merged_ids
        )
        if scored is not None:
            statistics = replace(statistics, teacher_log_probs=scored)
        record = token_record(batch, rewards, statistics, merged_ids, weights)
        return loss, record if spans is None else spans.recorded(record)

    def _weights(self, batch: Batch, chunk: PairStatistics, tokens: slice) -> Tensor:
        """Returns min(p_student / p_sampler, MAX_IMPORTANCE_WEIGHT), 1 if that is not known."""
        if batch.sampling_log_probs is None:
            key = "rollout.correction" if self.correction else "rollout.off_policy.weights"
            raise UsageError(
                f"{key}: truncated needs the sampler's log-probs, and the engine gave none with "
                f"its completions: set {key}=none"
            )
        if batch.spans is not None:
            of_spans = span_totals(batch.sampling_log_probs, batch.spans)
            batch = replace(batch, sampling_log_probs=of_spans)
        ratios = sampler_log_ratios(batch, chunk, self.merged_ids, tokens)
        weights = ratios.exp().clamp(max=MAX_IMPORTANCE_WEIGHT).nan_to_num(nan=1.0)
        return weights if self.correction else weights.where(batch.off_policy[tokens], 1.0)
