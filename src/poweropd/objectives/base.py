"""What every objective is and reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.kernels import Head, TokenStatistics


@dataclass(frozen=True)
class TokenRecord:
    """What is known of each trained token, [N] float32 each, without a gradient."""

    positions: Tensor  # in the completion
    rewards: Tensor  # r(t, p) alone: no bonus, no baseline
    student_log_probs: Tensor
    teacher_log_probs: Tensor
    entropy: Tensor  # of the student, nats
    sampler_log_ratios: Tensor  # ln p_student - ln p_sampler, full softmax, temperature 1; or NaN
    weights: Tensor  # importance weights; 1 without the correction
    top1: Tensor  # 1 where no token is more probable to the student, else 0
    teacher_entropy: Tensor  # NaN where the teacher gave log-probs alone
    teacher_top1: Tensor  # as `top1`; NaN where it is not known
    prompt_indices: Tensor  # with the next: which completion of the step
    sample_indices: Tensor

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


def sampler_log_ratios(
    batch: Batch, statistics: TokenStatistics, merged_ids: Tensor | None
) -> Tensor:
    """[N] ln p_student - ln p_sampler of the sampled token, NaN where one of them is not known.

    The student's is undone of a support. Of merged ids it has the sum, the sampler a single one.
    """
    if batch.sampling_log_probs is None:
        return torch.full_like(statistics.student_log_probs, torch.nan)
    own = statistics.student_log_probs + statistics.log_support
    ratios = own - batch.sampling_log_probs
    if merged_ids is None:
        return ratios
    return ratios.masked_fill(torch.isin(batch.student.targets, merged_ids), torch.nan)


def token_record(
    batch: Batch,
    rewards: Tensor,
    statistics: TokenStatistics,
    merged_ids: Tensor | None,
    weights: Tensor | None = None,
) -> TokenRecord:
    return TokenRecord(
        positions=batch.positions,
        rewards=rewards,
        student_log_probs=statistics.student_log_probs,
        teacher_log_probs=statistics.teacher_log_probs,
        entropy=statistics.entropy,
        sampler_log_ratios=sampler_log_ratios(batch, statistics, merged_ids),
        weights=torch.ones_like(rewards) if weights is None else weights,
        top1=statistics.top1.float(),
        teacher_entropy=batch.teacher_entropy,
        teacher_top1=batch.teacher_top1,
        prompt_indices=batch.keys[batch.completion_index, 0],
        sample_indices=batch.keys[batch.completion_index, 1],
    )
