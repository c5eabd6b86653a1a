"""Both models' heads side by side: the teacher's log-probs and the value of a token's context."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from poweropd.kernels.chunked_head import ChunkedHead
from poweropd.kernels.head import Head
from poweropd.kernels.softmax import (
    Actions,
    SoftmaxSummary,
    expectation,
    log_softmax_,
    merge_,
    summary_of,
    tiles,
)
from poweropd.kernels.statistics import PairStatistics
from poweropd.kernels.support import Support, restrict_

# (teacher log-probs, student log-probs), both [n, V] or [n, k] -> rewards of that shape, or a
# divergence [n]. Called without gradient.
Pointwise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's hidden states and head, for kernels that read both whole distributions.

    With a `reward` r the kernels know the value V(c) = sum_v p_v r(t_v, p_v) of every token's
    context c, exactly. A sampled reward less V(c) has the same expected gradient under exact
    sampling, and less variance. With a `support` both models' distributions are those over the
    support and the student's target, renormalised, and so are all statistics.
    """

    hidden: Tensor  # [N, H_teacher]; no gradient reaches it
    head: Head  # over the student's vocabulary
    targets: Tensor | None = None  # [N] int64, if they differ from the student's
    reward: Pointwise | None = None
    support: Support | None = None

    def beside(self, student: ChunkedHead, statistics: PairStatistics) -> "PairForward":
        """Returns what computes the student's chunks beside this teacher."""
        return PairForward(student, self, statistics)


class PairForward:
    """Computes both models' log-probabilities of one chunk after the other, in one buffer each."""

    def __init__(
        self, student: ChunkedHead, teacher: TeacherHead, statistics: PairStatistics
    ) -> None:
        """Takes what is to be recorded; raises ValueError unless the teacher fits the student."""
        self.student, self.given, self.statistics = student, teacher, statistics
        targets = student.targets if teacher.targets is None else teacher.targets
        own = (student.num_tokens, student.vocab_size)
        other = (teacher.hidden.shape[0], teacher.head.vocab_size)
        if own != other:
            raise ValueError(
                f"teacher hidden and weight: expected {own[0]} tokens and the student's {own[1]} "
                f"ids, got {other[0]} and {other[1]}; slice both to the vocabulary they share"
            )
        inputs = (teacher.hidden, teacher.head, targets, student.merged_ids, student.rows)
        self.teacher = ChunkedHead(*inputs, owner="teacher ")

    def log_probs(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Returns the student's and the teacher's log-probs [n, V], over the support if any."""
        student, teacher = self.student.logits(tokens), self.teacher.logits(tokens)
        log_softmax_(student)
        log_softmax_(teacher)
        if self.given.support is not None and self.student.targets is not None:
            outside = self.given.support.outside(student, self.student.targets[tokens])
            self.statistics.log_support[tokens] = restrict_(student, outside).float()
            restrict_(teacher, outside)
        return student, teacher

    def score(
        self, tokens: slice, student: Tensor, teacher: Tensor
    ) -> tuple[Actions, SoftmaxSummary]:
        """Records the teacher's log-probs of its targets; returns what the student's come from."""
        taken = self.teacher.actions(tokens, teacher)
        self.statistics.teacher_log_probs[tokens] = taken.log_weights.float()
        return self.student.actions(tokens, student), summary_of(student)

    def probabilities(self, tokens: slice) -> tuple[Tensor, Actions, SoftmaxSummary]:
        """Returns the student's probabilities [n, V]; records all of the teacher's numbers."""
        student, teacher = self.log_probs(tokens)
        actions, summary = self.score(tokens, student, teacher)
        if self.given.reward is not None:
            values = self._values(student, teacher, self.given.reward)
            self.statistics.values[tokens] = values.float()
        return student.exp_(), actions, summary

    def _values(self, student: Tensor, teacher: Tensor, reward: Pointwise) -> Tensor:
        """Returns V(c) [n] from log-probs [n, V]; the student's stay, the teacher's are merged."""
        merged_ids = self.student.merged_ids
        apart = None if merged_ids is None else student[:, merged_ids]
        for log_probs in (student, teacher):
            merge_(log_probs, merged_ids)
        values = student.new_empty(student.shape[0])
        for rows, spare in tiles(student):
            p = student[rows]
            r = rewards_of(reward, teacher[rows], p)
            values[rows], _ = expectation(p.exp(), r, spare)
        if apart is not None:
            student[:, merged_ids] = apart
        return values


def rewards_of(reward: Pointwise, teacher: Tensor, student: Tensor) -> Tensor:
    """Returns the rewards of log-probs, of their shape; raises ValueError if they have another."""
    rewards = reward(teacher, student)
    if rewards.shape != student.shape:
        raise ValueError(f"reward: expected {list(student.shape)}, got {list(rewards.shape)}")
    return rewards.to(student.dtype)
