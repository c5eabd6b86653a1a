"""A student beside its teacher, measured and not trained."""

from dataclasses import dataclass

from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.kernels import Head, compare_heads
from poweropd.objectives.base import Objective, TokenRecord, teacher_of, token_record
from poweropd.rewards import Reward


@dataclass(frozen=True)
class ComparedTokens(TokenRecord):
    """The record of tokens in whose contexts both models were compared, [N] each."""

    reverse_kl: Tensor  # float32, nats, over the whole vocabulary; NaN without the teacher's head
    greedy: Tensor  # int64, the student's most probable id
    teacher_greedy: Tensor  # int64, the teacher's; -1 without its head


@dataclass(frozen=True)
class Compared(Objective):
    """Compares, over the whole vocabulary, in the contexts of a batch; its loss is 0.

    Without a `teacher_head` only the student's half is known. `merged_ids` [M] are one action.
    """

    teacher_head: Head | None = None
    merged_ids: Tensor | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        head: Head,
        batch: Batch,
        reward: Reward,
        token_weight: Tensor | float,
    ) -> tuple[Tensor, ComparedTokens]:
        """Returns 0 and the record of a micro-batch's tokens; the rewards are the reward's."""
        teacher = None if self.teacher_head is None else teacher_of(batch, self.teacher_head)
        found = compare_heads(
            hidden_states, head, batch.student.targets, teacher, merged_ids=self.merged_ids
        )
        statistics = found.statistics
        rewards = reward(statistics.teacher_log_probs, statistics.log_probs)
        record = ComparedTokens(
            **vars(token_record(batch, rewards, statistics, self.merged_ids)),
            reverse_kl=found.reverse_kl,
            greedy=found.greedy,
            teacher_greedy=found.teacher_greedy,
        )
        return hidden_states.new_zeros(()), record
