"""The full-vocabulary objective."""

from dataclasses import dataclass

from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.kernels import (
    Head,
    Support,
    TokenStatistics,
    ValueBaseline,
    linear_full_vocab,
    linear_policy_gradient,
)
from poweropd.objectives.base import TokenRecord, token_record
from poweropd.rewards import Reward


@dataclass(frozen=True)
class FullVocab:
    """The exact expectation of `Sampled` over the student's next token, for any pointwise reward.

    Its value is the reward's divergence; for the log ratio that is the reverse KL. A bonus says
    something of the sampled token alone, so it is the sampled loss, -sum bonus * ln p, beside it.
    """

    reward: Reward
    token_weight: float
    teacher_head: Head
    top_k: int | None = None
    merged_ids: Tensor | None = None
    support: Support | None = None

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
            top_k=self.top_k,
            teacher_options=self.teacher_head.options,
            merged_ids=self.merged_ids,
            support=self.support,
            targets=batch.student.targets,
            teacher_targets=batch.teacher.targets,
            statistics=statistics,
            **head.options,
        )
        if batch.task_reward.any():
            loss = loss + self._task_reward_loss(hidden_states, head, batch)
        rewards = self.reward(statistics.teacher_log_probs, statistics.student_log_probs)
        return loss, token_record(batch, rewards, statistics, self.merged_ids)

    def _task_reward_loss(self, hidden_states: Tensor, head: Head, batch: Batch) -> Tensor:
        teacher = None
        if self.support is not None:  # the student's log-probs are those over the support
            assert batch.teacher_hidden is not None
            teacher = ValueBaseline(batch.teacher_hidden, self.teacher_head, support=self.support)
        return linear_policy_gradient(
            hidden_states,
            head.weight,
            batch.student.targets,
            lambda _, tokens: self.token_weight * batch.task_reward[tokens],
            merged_ids=self.merged_ids,
            baseline=teacher,
            **head.options,
        )
