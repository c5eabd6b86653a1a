"""Token selection: which of a completion's trained tokens an update keeps.

How many is known from their number alone, so the global number of trained tokens is known before
any forward.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.kernels import Head, linear_log_prob
from poweropd.objectives.base import Objective, TokenRecord

# () -> the teacher's and the student's log-probs of the targets, [N] each: a head matmul.
LogProbs = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Selection(ABC):
    """Keeps ceil(keep * n) of a completion's n trained tokens, those with the highest scores."""

    keep: float

    @abstractmethod
    def scores(self, batch: Batch, log_probs: LogProbs) -> Tensor:
        """[N]; which are the highest must not depend on the other completions of the batch."""

    def counts(self, lengths: Tensor) -> Tensor:
        """How many tokens are kept of completions with so many, both int64."""
        # 0.07 * 100 is 7.000000000000001 in floating point, which is not meant to be 8.
        return torch.ceil(self.keep * lengths.double() - 1e-9).long()

    def choose(self, batch: Batch, log_probs: LogProbs) -> Tensor:
        """Indices of the kept tokens, increasing; of equal scores the earlier token stays."""
        scores = self.scores(batch, log_probs)
        order = scores.argsort(descending=True, stable=True)
        owner, lengths = batch.completion_index, batch.completion_index.bincount()
        order = order[owner[order].argsort(stable=True)]  # by completion, then by score
        owner = owner[order]
        rank = torch.arange(len(order), device=order.device) - (lengths.cumsum(0) - lengths)[owner]
        return order[rank < self.counts(lengths)[owner]].sort().values


@dataclass(frozen=True)
class Dial(Selection):
    """|ln t - ln p|^(1 - beta) * |t - p|^beta (DIAL-OPD, arXiv:2610.11659)."""

    beta: float

    def scores(self, batch: Batch, log_probs: LogProbs) -> Tensor:
        teacher, student = log_probs()
        # Two log-probs of -inf agree; an infinite ratio is the largest number.
        ratio = (teacher - student).abs().nan_to_num(nan=0.0)
        return ratio ** (1 - self.beta) * (teacher.exp() - student.exp()).abs() ** self.beta


@dataclass(frozen=True)
class Random(Selection):
    """Uniformly at random, the control of `Dial`; each completion's own seed decides."""

    def scores(self, batch: Batch, log_probs: LogProbs) -> Tensor:
        lengths = batch.completion_index.bincount(minlength=len(batch.seeds)).tolist()
        drawn = [
            torch.rand(n, generator=torch.Generator().manual_seed(seed))
            for n, seed in zip(lengths, batch.seeds.tolist(), strict=True)
        ]
        return torch.cat([torch.empty(0), *drawn]).to(batch.completion_index.device)


# Name -> (keep, beta) -> selection.
SELECTIONS: dict[str, Callable[[float, float], Selection]] = {
    "dial": Dial,
    "random": lambda keep, beta: Random(keep),
}


@dataclass(frozen=True)
class Selected:
    """`objective` on the tokens that a selection keeps of each completion.

    Scores are log-probs under the full softmax, for one more head matmul over all tokens; the
    objective's own matmuls are over the kept tokens only.
    """

    objective: Objective
    selection: Selection
    teacher_head: Head | None = None
    merged_ids: Tensor | None = None

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch
    ) -> tuple[Tensor, TokenRecord]:
        def log_probs() -> tuple[Tensor, Tensor]:
            student = self._log_probs(hidden_states, head, batch.student.targets)
            if batch.teacher_log_probs is not None:
                return batch.teacher_log_probs, student
            assert batch.teacher_hidden is not None, "the examples have not been scored"
            assert self.teacher_head is not None
            targets = batch.teacher.targets
            return self._log_probs(batch.teacher_hidden, self.teacher_head, targets), student

        tokens = self.selection.choose(batch, log_probs)
        return self.objective(hidden_states.index_select(0, tokens), head, batch.select(tokens))

    def _log_probs(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        return linear_log_prob(
            hidden, head.weight, targets, merged_ids=self.merged_ids, **head.options
        )
