"""The full-vocabulary objective."""

from dataclasses import dataclass

from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.kernels import (
    Head,
    PairStatistics,
    Support,
    TeacherHead,
    full_vocab_loss,
    sampled_loss,
    top_k_loss,
)
from poweropd.objectives.base import (
    Objective,
    TokenRecord,
    factors,
    teacher_of,
    token_record,
    top_k_of,
)
from poweropd.rewards import Reward


@dataclass(frozen=True)
class FullVocab(Objective):
    """The exact expectation of `Sampled` over the student's next token, for any pointwise reward.

    Its value is the reward's divergence; for the log ratio that is the reverse KL. A bonus says
    something about the sampled token alone, so the sampled loss, -sum bonus * ln p, is added.
    Without a `teacher_head` the expectation is over the teacher's k most probable ids, which come
    with the batch, and one outcome for all others; then `merged_ids` and `support` are None.
    """

    teacher_head: Head | None
    top_k: int | None = None
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
        student = (hidden_states, head, batch.student.targets)
        token_weights = factors(token_weight, batch)
        loss, statistics = self._expectation(student, batch, reward, token_weights)
        if batch.task_reward.any():
            bonus_loss, _ = sampled_loss(
                *student,
                lambda _, tokens: token_weights[tokens] * batch.task_reward[tokens],
                # The student's log-probs are those over the support.
                self._teacher(batch) if self.support is not None else None,
                merged_ids=self.merged_ids,
                entropy=False,
            )
            loss = loss + bonus_loss
        rewards = reward(statistics.teacher_log_probs, statistics.log_probs)
        return loss, token_record(batch, rewards, statistics, self.merged_ids)

    def _expectation(
        self,
        student: tuple[Tensor, Head, Tensor],
        batch: Batch,
        reward: Reward,
        token_weights: Tensor,
    ) -> tuple[Tensor, PairStatistics]:
        """Returns the loss without the bonus; `student` are hidden states, head and targets."""
        value = reward.divergence
        if self.teacher_head is None:
            return top_k_loss(*student, top_k_of(batch, reward), token_weights, divergence=value)
        return full_vocab_loss(
            *student,
            self._teacher(batch, reward),
            token_weights,
            divergence=value,
            top_k=self.top_k,
            merged_ids=self.merged_ids,
        )

    def _teacher(self, batch: Batch, reward: Reward | None = None) -> TeacherHead:
        assert self.teacher_head is not None, "this objective has no teacher's head"
        return teacher_of(batch, self.teacher_head, reward, self.support)
