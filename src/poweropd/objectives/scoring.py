"""Both models' scores of a batch's tokens, before an objective trains on some or all of them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.kernels import Comparison, Head, compare_heads, score_tokens
from poweropd.objectives.base import teacher_of
from poweropd.rewards import log_ratio


@dataclass(frozen=True)
class TokenScores:
    """What selections and weights may ask of a batch: numbers under the full softmax.

    Nothing is computed before it is asked for. `hidden_states` and `head` are the student's.
    """

    hidden_states: Tensor
    head: Head
    batch: Batch
    teacher_head: Head | None
    merged_ids: Tensor | None

    @cached_property
    def log_probs(self) -> tuple[Tensor, Tensor]:
        """Returns the teacher's and the student's log-probs of the targets, [N] each.

        That costs one more matmul with the student's head, and one with the teacher's unless the
        examples have been scored.
        """
        batch = self.batch
        student = self._scored(self.hidden_states, self.head, batch.student.targets)
        if batch.teacher_log_probs is not None:
            return batch.teacher_log_probs, student
        assert self.teacher_head is not None, "the examples have not been scored"
        teacher = teacher_of(batch, self.teacher_head)
        return self._scored(teacher.hidden, teacher.head, batch.teacher.targets), student

    def comparison(self, top_k: int) -> Comparison:
        """Returns both models compared in each token's context; it costs a matmul of each head."""
        assert self.teacher_head is not None, "both whole distributions need the teacher's head"
        return compare_heads(
            self.hidden_states,
            self.head,
            self.batch.student.targets,
            teacher_of(self.batch, self.teacher_head),
            top_k=top_k,
            merged_ids=self.merged_ids,
        )

    def _scored(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        merged_ids = self.merged_ids
        return score_tokens(hidden, head, targets, merged_ids=merged_ids, entropy=False).log_probs


def distances(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """Returns |ln t - ln p| of each token; an infinite one counts as the largest number."""
    found = log_ratio(teacher_log_probs, student_log_probs).abs()
    return found.clamp(max=torch.finfo(found.dtype).max)
