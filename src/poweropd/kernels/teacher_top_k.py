"""What a teacher tells of its k most probable ids alone, and the objective made of it.

The k ids of a context and "any other id", the tail, are k + 1 outcomes. Both models' probabilities
of all of them are known: the teacher's of the tail is what its k leave.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.kernels.chunked_head import ChunkedHead
from poweropd.kernels.head import LOWEST, Head
from poweropd.kernels.pair import Pointwise, rewards_of
from poweropd.kernels.softmax import (
    Actions,
    SoftmaxSummary,
    check_tokens,
    expectation,
    log_softmax_,
    softmax_,
    summary_of,
    weights_of,
)
from poweropd.kernels.statistics import PairStatistics, TokenStatistics

# The teacher's tail counts as at least this much where the student's has any mass: what is left of
# 1 less a sum of float32 probabilities is rounded by about 1e-7.
SMALLEST_TAIL = 1e-6


@dataclass(frozen=True)
class TeacherTopK:
    """A teacher's k most probable ids of N contexts, for kernels that need no more of it.

    One that is outside [0, V) the student does not have: an outcome to which it gives nothing.
    """

    ids: Tensor  # [N, k] int64, distinct within a context
    log_probs: Tensor  # [N, k] float32, their ln t by the teacher's full softmax
    target_log_probs: Tensor  # [N] float32, ln t of the teacher's targets
    reward: Pointwise | None = None  # with it the kernels know V(c) over the k + 1 outcomes

    def check(self, num_tokens: int) -> None:
        """Raises ValueError for wrong shapes or dtypes."""
        check_tokens("teacher target_log_probs", self.target_log_probs, num_tokens, None)
        shapes = [list(tensor.shape) for tensor in (self.ids, self.log_probs)]
        is_right = self.ids.ndim == 2 and shapes[0] == shapes[1] and shapes[0][0] == num_tokens
        if not is_right or self.ids.dtype != torch.int64:
            raise ValueError(
                f"teacher ids and log_probs: expected [{num_tokens}, k] torch.int64 and "
                f"[{num_tokens}, k], got {shapes[0]} {self.ids.dtype} and {shapes[1]}"
            )

    def beside(self, student: ChunkedHead, statistics: PairStatistics) -> "TopKForward":
        """Returns what computes the student's chunks beside this teacher."""
        return TopKForward(student, self, statistics)


@dataclass(frozen=True)
class Outcomes:
    """The k + 1 outcomes of n contexts: log-probs [n, k + 1] of both models, the tail's last."""

    teacher: Tensor
    student: Tensor
    inside: tuple[Tensor, Tensor]  # [m] each: the contexts and the ids that the student has
    places: Tensor  # [m], which of the k each of these is

    @classmethod
    def of(cls, teacher: TeacherTopK, tokens: slice, student: Tensor) -> "Outcomes":
        """Returns the outcomes of a chunk; the student's log-probs [n, V] become probabilities.

        Those of the k ids become 0.
        """
        ids, t = teacher.ids[tokens], teacher.log_probs[tokens].to(student.dtype).clamp(min=LOWEST)
        known = (ids >= 0) & (ids < student.shape[1])
        p = student.gather(1, ids.where(known, 0)).masked_fill(~known, LOWEST)
        rows, places = known.nonzero(as_tuple=True)
        inside = (rows, ids[rows, places])
        student.exp_()[inside] = 0.0
        outside = student.sum(1)
        # The tail is a small difference of large numbers.
        left = (1 - t.double().exp().sum(1)).clamp(min=0).to(t.dtype)
        left = torch.where(outside > 0, left.clamp(min=SMALLEST_TAIL), left)
        tails = (tail.log().clamp(min=LOWEST)[:, None] for tail in (left, outside))
        t, p = (torch.cat(parts, 1) for parts in zip((t, p), tails, strict=True))
        return cls(t, p, inside, places)

    def advantages(self, reward: Pointwise) -> tuple[Tensor, Tensor]:
        """Returns V(c) = sum p r [n] and the outcomes' r - V [n, k + 1]."""
        r, p = rewards_of(reward, self.teacher, self.student), self.student.exp()
        return expectation(p, r, torch.empty_like(p))

    def fill_(self, outside: Tensor, values: Tensor) -> None:
        """Writes values [n, k + 1] of the k ids into [n, V], which holds 0 there."""
        outside[self.inside] = values[self.inside[0], self.places]


class TopKForward:
    """Computes the student's chunks beside the teacher's k most probable ids."""

    def __init__(
        self, student: ChunkedHead, teacher: TeacherTopK, statistics: PairStatistics
    ) -> None:
        """Takes what is to be recorded; raises ValueError unless the teacher fits the student."""
        teacher.check(student.num_tokens)
        if student.merged_ids is not None:
            raise ValueError("merged_ids: expected None beside a teacher's k most probable ids")
        self.student, self.given, self.statistics = student, teacher, statistics

    def log_probs(self, tokens: slice) -> tuple[Tensor, Actions, SoftmaxSummary]:
        """Returns the student's log-probs [n, V], and what its tokens' statistics come from."""
        log_probs = self.student.logits(tokens)
        log_softmax_(log_probs)
        actions, summary = self.student.actions(tokens, log_probs), summary_of(log_probs)
        self.statistics.teacher_log_probs[tokens] = self.given.target_log_probs[tokens].float()
        return log_probs, actions, summary

    def outcomes(self, tokens: slice, student: Tensor) -> Outcomes:
        """Returns `Outcomes.of` a chunk, and records how likely the tail is to both models."""
        found = Outcomes.of(self.given, tokens, student)
        self.statistics.tail[tokens] = found.student[:, -1].exp().float()
        self.statistics.teacher_tail[tokens] = found.teacher[:, -1].exp().float()
        return found

    def probabilities(self, tokens: slice) -> tuple[Tensor, Actions, SoftmaxSummary]:
        """Returns the student's probabilities [n, V]; records all of the teacher's numbers."""
        student, actions, summary = self.log_probs(tokens)
        if self.given.reward is None:
            return student.exp_(), actions, summary
        found = self.outcomes(tokens, student)
        self.statistics.values[tokens] = found.advantages(self.given.reward)[0].float()
        found.fill_(student, found.student.exp())
        return student, actions, summary


def top_k_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    teacher: TeacherTopK,
    token_weight: Tensor | float,
    *,
    divergence: Pointwise | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, PairStatistics]:
    """Returns the loss of `linear_top_k`, whose core this is, and the statistics of the targets.

    The teacher has to have a reward; `divergence` is what the front calls `value`.
    """
    student = ChunkedHead(hidden, head, targets, None, chunk_size)
    if teacher.reward is None:
        raise ValueError("teacher reward: expected the reward to train with, got None")
    weights = weights_of(token_weight, student.num_tokens, hidden.device)
    statistics = PairStatistics.empty(student.num_tokens, hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        forward = teacher.beside(student, statistics)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for tokens in student.chunks:
            buffer, actions, summary = forward.log_probs(tokens)
            statistics.record(tokens, actions.log_weights.float(), actions, summary)
            found = forward.outcomes(tokens, buffer)
            values, advantages = found.advantages(teacher.reward)
            divergences = (
                -values if divergence is None else divergence(found.teacher, found.student)
            )
            w = weights[tokens]
            loss += torch.where(w == 0, 0.0, w * divergences).sum()
            if student.needs_gradient:
                buffer.mul_(-advantages[:, -1:])  # all ids of the tail have its advantage
                found.fill_(buffer, -found.student.exp() * advantages)
                student.add_gradient(buffer, w, tokens)
    return student.attach(loss), statistics


def score_top_k(
    hidden: Tensor, head: Head, targets: Tensor, k: int, *, chunk_size: int | None = None
) -> tuple[TokenStatistics, TeacherTopK]:
    """Scores targets as `score_tokens` does, and tells the k most probable ids of each context."""
    if not 1 <= k <= head.vocab_size:
        raise ValueError(f"k: expected 1 to {head.vocab_size}, got {k}")
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        model = ChunkedHead(hidden, head, targets, None, chunk_size)
        statistics = TokenStatistics.empty(model.num_tokens, hidden.device)
        ids = torch.empty(model.num_tokens, k, dtype=torch.int64, device=hidden.device)
        top_log_probs = torch.empty(model.num_tokens, k, device=hidden.device)
        for tokens in model.chunks:
            logits = model.logits(tokens)
            largest, ids[tokens] = logits.topk(k)
            actions, summary = model.actions(tokens, logits), softmax_(logits, entropy=True)
            statistics.record(tokens, summary.log_probs(actions.log_weights), actions, summary)
            top_log_probs[tokens] = summary.log_probs(largest.T).T.float()
    return statistics, TeacherTopK(ids, top_log_probs, statistics.log_probs)
