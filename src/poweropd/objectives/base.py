"""What every objective is and reports."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.kernels import (
    Head,
    PairStatistics,
    Support,
    TeacherHead,
    TeacherTopK,
    TokenStatistics,
)
from poweropd.rewards import Reward, log_ratio


@dataclass(frozen=True)
class TokenRecord:
    """What is known of each trained token, [N] float32 each, without a gradient.

    Where a teacher has another tokenizer, rewards and both models' log-probs are those of the
    token's span.
    """

    positions: Tensor  # in the completion
    rewards: Tensor  # r(t, p) alone: no bonus, no baseline
    student_log_probs: Tensor
    teacher_log_probs: Tensor
    entropy: Tensor  # of the student, nats
    sampler_log_ratios: Tensor  # ln p_student - ln p_sampler, full softmax, temperature 1; or NaN
    weights: Tensor  # importance weights; 1 without the correction
    top1: Tensor  # 1 if no token is more probable to the student, else 0
    teacher_entropy: Tensor  # NaN if the teacher gave log-probs alone
    teacher_top1: Tensor  # as `top1`; NaN if it is not known
    tail: Tensor  # the student's probability of all but the teacher's k ids; NaN without those
    teacher_tail: Tensor  # the teacher's
    prompt_indices: Tensor  # with the next: which completion of the step
    sample_indices: Tensor
    span_sizes: Tensor  # trained tokens of the token's span; 1 without spans

    @classmethod
    def cat(cls, records: Sequence[Self]) -> Self:
        """Returns one record of all tokens, on the CPU."""
        columns = zip(*(vars(r).values() for r in records), strict=True)
        return cls(*(torch.cat([part.cpu() for part in column]) for column in columns))

    @property
    def log_ratios(self) -> Tensor:
        """Returns ln t - ln p of each token, [N]: an equal part of its span's.

        Their sum over a completion's tokens is that of its spans.
        """
        return log_ratio(self.teacher_log_probs, self.student_log_probs) / self.span_sizes


class Objective(ABC):
    """What a student is trained to minimise; holds what stays the same over a run."""

    @abstractmethod
    def __call__(
        self,
        hidden_states: Tensor,
        head: Head,
        batch: Batch,
        reward: Reward,
        token_weight: Tensor | float,
    ) -> tuple[Tensor, TokenRecord]:
        """Returns the loss of a micro-batch, and the record of its trained tokens.

        `hidden_states` [N, H] and `head` are the student's. `token_weight`, one number or [N], is
        a factor of each token's loss, in which 1 / N of the whole step is.
        """

    def num_tokens(self, lengths: Iterable[int]) -> int:
        """Returns how many tokens are trained on, of completions with so many in their masks."""
        return sum(lengths)


def teacher_of(
    batch: Batch, head: Head, reward: Reward | None = None, support: Support | None = None
) -> TeacherHead:
    """Returns what the kernels need of a teacher that has read the batch."""
    assert batch.teacher_hidden is not None, "the teacher has not read this batch"
    return TeacherHead(batch.teacher_hidden, head, batch.teacher.targets, reward, support)


def top_k_of(batch: Batch, reward: Reward | None = None) -> TeacherTopK:
    """Returns what the kernels need of a teacher that told its k most probable ids."""
    top, scored = batch.teacher_top, batch.teacher_log_probs
    assert top is not None, "the teacher has not told its most probable ids"
    assert scored is not None, "the examples have not been scored"
    return TeacherTopK(top.ids, top.log_probs, scored, reward)


def with_reference(reward: Reward, batch: Batch, tokens: slice) -> Reward:
    """Returns a reward with what a reference model says of these tokens, if it needs that."""
    if not reward.needs_reference:
        return reward
    assert batch.reference_log_probs is not None, "no reference model has scored the examples"
    return reward.with_reference(batch.reference_log_probs[tokens])


def factors(token_weight: Tensor | float, batch: Batch) -> Tensor:
    """Returns the token weights of a batch, [N] float32, from one number or [N]."""
    device = batch.task_reward.device
    weights = torch.as_tensor(token_weight, dtype=torch.float32, device=device)
    return weights.expand(len(batch.positions))


def sampler_log_ratios(
    batch: Batch,
    statistics: TokenStatistics,
    merged_ids: Tensor | None,
    tokens: slice = slice(None),
) -> Tensor:
    """Returns ln p_student - ln p_sampler [n] of sampled tokens, NaN if one of them is not known.

    `statistics` are the student's of `tokens`. The student's log-prob is converted back to the full
    softmax. A merged id has the sum of all of them there, and the log-prob of one to the sampler.
    """
    if batch.sampling_log_probs is None:
        return torch.full_like(statistics.log_probs, torch.nan)
    own = statistics.log_probs + statistics.log_support
    ratios = own - batch.sampling_log_probs[tokens]
    if merged_ids is None:
        return ratios
    return ratios.masked_fill(torch.isin(batch.student.targets[tokens], merged_ids), torch.nan)


def token_record(
    batch: Batch,
    rewards: Tensor,
    statistics: PairStatistics,
    merged_ids: Tensor | None,
    weights: Tensor | None = None,
) -> TokenRecord:
    """Returns the record of a micro-batch; the weights are 1 if there are none."""
    return TokenRecord(
        positions=batch.positions,
        rewards=rewards,
        student_log_probs=statistics.log_probs,
        teacher_log_probs=statistics.teacher_log_probs,
        entropy=statistics.entropy,
        sampler_log_ratios=sampler_log_ratios(batch, statistics, merged_ids),
        weights=torch.ones_like(rewards) if weights is None else weights,
        top1=statistics.top1.float(),
        teacher_entropy=batch.teacher_entropy,
        teacher_top1=batch.teacher_top1,
        tail=statistics.tail,
        teacher_tail=statistics.teacher_tail,
        prompt_indices=batch.keys[batch.completion_index, 0],
        sample_indices=batch.keys[batch.completion_index, 1],
        span_sizes=torch.ones_like(rewards),
    )
