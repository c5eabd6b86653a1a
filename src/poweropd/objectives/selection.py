"""Token selection: which of a completion's trained tokens an update keeps.

How many tokens are kept is known from their number alone, so the global number of trained tokens is
known before any forward.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.kernels import Head, score_tokens
from poweropd.objectives.base import Objective, TokenRecord, teacher_of
from poweropd.objectives.full_vocab import FullVocab
from poweropd.objectives.sampled import Sampled
from poweropd.rewards import Reward, log_ratio

# () -> the teacher's and the student's log-probs of the targets, [N] each. It costs a head matmul.
LogProbs = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Selection(ABC):
    """Keeps ceil(keep * n) of a completion's n trained tokens, those with the highest scores."""

    keep: float

    @abstractmethod
    def scores(self, batch: Batch, log_probs: LogProbs) -> Tensor:
        """Returns a score [N] of each token.

        Which scores are the highest must not depend on the other completions of the batch.
        """

    def counts(self, lengths: Tensor) -> Tensor:
        """Returns how many tokens are kept, of completions with so many; both are int64."""
        # 0.07 * 100 is 7.000000000000001 in floating point, which is not meant to be 8.
        return torch.ceil(self.keep * lengths.double() - 1e-9).long()

    def choose(self, batch: Batch, log_probs: LogProbs) -> Tensor:
        """Returns the indices of the kept tokens, increasing; of equal scores the earlier stays."""
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
        """Returns the scores [N]; an infinite log ratio counts as the largest number."""
        teacher, student = log_probs()
        ratio = log_ratio(teacher, student).abs()
        ratio = ratio.clamp(max=torch.finfo(ratio.dtype).max)
        return ratio ** (1 - self.beta) * (teacher.exp() - student.exp()).abs() ** self.beta


@dataclass(frozen=True)
class Random(Selection):
    """Uniformly at random, the control of `Dial`; each completion's own seed decides."""

    def scores(self, batch: Batch, log_probs: LogProbs) -> Tensor:
        """Returns uniform random scores [N], for which no log-probs are needed."""
        lengths = batch.completion_index.bincount(minlength=len(batch.seeds)).tolist()
        drawn = [
            torch.rand(n, generator=torch.Generator().manual_seed(seed))
            for n, seed in zip(lengths, batch.seeds.tolist(), strict=True)
        ]
        return torch.cat([torch.empty(0), *drawn]).to(batch.completion_index.device)


@dataclass(frozen=True)
class Selected(Objective):
    """`objective` on the tokens that a selection keeps of each completion.

    Scores are made of log-probs under the full softmax, for one more head matmul over all tokens;
    the objective's own matmuls are over the kept tokens only.
    """

    objective: Sampled | FullVocab
    selection: Selection

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch, reward: Reward, token_weight: float
    ) -> tuple[Tensor, TokenRecord]:
        """Returns the loss of the kept tokens of a micro-batch, and their record."""

        def log_probs() -> tuple[Tensor, Tensor]:
            student = self._log_probs(hidden_states, head, batch.student.targets)
            if batch.teacher_log_probs is not None:
                return batch.teacher_log_probs, student
            assert self.objective.teacher_head is not None, "the examples have not been scored"
            teacher = teacher_of(batch, self.objective.teacher_head)
            return self._log_probs(teacher.hidden, teacher.head, batch.teacher.targets), student

        tokens = self.selection.choose(batch, log_probs)
        kept = hidden_states.index_select(0, tokens)
        return self.objective(kept, head, batch.select(tokens), reward, token_weight)

    def num_tokens(self, lengths: Iterable[int]) -> int:
        """Returns how many tokens are kept, of completions with so many in their masks."""
        return int(self.selection.counts(torch.tensor(list(lengths), dtype=torch.long)).sum())

    def _log_probs(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        merged_ids = self.objective.merged_ids
        return score_tokens(hidden, head, targets, merged_ids=merged_ids, entropy=False).log_probs
