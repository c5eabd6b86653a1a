"""The full-vocabulary objective."""

from dataclasses import dataclass, replace

from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.kernels import Head, Support, full_vocab_loss, sampled_loss
from poweropd.objectives.base import Objective, TokenRecord, factors, teacher_of, token_record
from poweropd.rewards import Reward


@dataclass(frozen=True)
class FullVocab(Objective):
    """The exact expectation of `Sampled` over the student's next token, for any pointwise reward.

    Its value is the reward's divergence; for the log ratio that is the reverse KL. A bonus says
    something about the sampled token alone, so the sampled loss, -sum bonus * ln p, is added.
    """

    teacher_head: Head
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
        targets, token_weights = batch.student.targets, factors(token_weight, batch)
        teacher = teacher_of(batch, self.teacher_head, reward, self.support)
        loss, statistics = full_vocab_loss(
            hidden_states,
            head,
            targets,
            teacher,
            token_weights,
            divergence=reward.divergence,
            top_k=self.top_k,
            merged_ids=self.merged_ids,
        )
        if batch.task_reward.any():
            bonus_loss, _ = sampled_loss(
                hidden_states,
                head,
                targets,
                lambda _, tokens: token_weights[tokens] * batch.task_reward[tokens],
                # The student's log-probs are those over the support.
                None if self.support is None else replace(teacher, reward=None),
                merged_ids=self.merged_ids,
                entropy=False,
            )
            loss = loss + bonus_loss
        rewards = reward(statistics.teacher_log_probs, statistics.log_probs)
        return loss, token_record(batch, rewards, statistics, self.merged_ids)
