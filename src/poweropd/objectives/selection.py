"""Token selection: which of a completion's trained tokens an update keeps.

How many tokens are kept is known from their number alone, so the global number of trained tokens is
known before any forward.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.errors import import_object
from poweropd.kernels import Head
from poweropd.objectives import SELECTIONS, WEIGHTS
from poweropd.objectives.base import Objective, TokenRecord, factors
from poweropd.objectives.full_vocab import FullVocab
from poweropd.objectives.sampled import Sampled
from poweropd.objectives.scoring import TokenScores, distances
from poweropd.objectives.weights import Drift
from poweropd.rewards import Reward


@dataclass(frozen=True)
class Selection(ABC):
    """Keeps ceil(keep * n) of a completion's n trained tokens, those with the highest scores."""

    keep: float

    @abstractmethod
    def scores(self, batch: Batch, scores: TokenScores) -> Tensor:
        """Returns a score [N] of each token.

        Which scores are the highest must not depend on the other completions of the batch.
        """

    def counts(self, lengths: Tensor) -> Tensor:
        """Returns how many tokens are kept, of completions with so many; both are int64."""
        # 0.07 * 100 is 7.000000000000001 in floating point, which is not meant to be 8.
        return torch.ceil(self.keep * lengths.double() - 1e-9).long()

    def choose(self, batch: Batch, scores: TokenScores) -> Tensor:
        """Returns the indices of the kept tokens, increasing; of equal scores the earlier stays."""
        order = self.scores(batch, scores).argsort(descending=True, stable=True)
        owner, lengths = batch.completion_index, batch.completion_index.bincount()
        order = order[owner[order].argsort(stable=True)]  # by completion, then by score
        owner = owner[order]
        rank = torch.arange(len(order), device=order.device) - (lengths.cumsum(0) - lengths)[owner]
        return order[rank < self.counts(lengths)[owner]].sort().values


@dataclass(frozen=True)
class Dial(Selection):
    """|ln t - ln p|^(1 - beta) * |t - p|^beta (DIAL-OPD, arXiv:2610.11659)."""

    beta: float

    def scores(self, batch: Batch, scores: TokenScores) -> Tensor:
        """Returns the scores [N]."""
        teacher, student = scores.log_probs
        difference = (teacher.exp() - student.exp()).abs()
        return distances(teacher, student) ** (1 - self.beta) * difference**self.beta


@dataclass(frozen=True)
class Random(Selection):
    """Uniformly at random, the control of `Dial`; each completion's own seed decides."""

    def scores(self, batch: Batch, scores: TokenScores) -> Tensor:
        """Returns uniform random scores [N], for which no log-probs are needed."""
        drawn = [
            torch.rand(len(own), generator=torch.Generator().manual_seed(seed))
            for own, seed in zip(
                batch.by_completion(batch.positions), batch.seeds.tolist(), strict=True
            )
        ]
        return torch.cat([torch.empty(0), *drawn]).to(batch.completion_index.device)


@dataclass(frozen=True)
class Teachable(Selection):
    """KL(t || p), times the teacher's mass on the student's `top_k` ids (arXiv:2605.26844).

    So tokens stay in whose contexts the models disagree about ids that the student would sample.
    Each factor is scaled to [0, 1] between its 5% and 95% quantiles within the completion.
    """

    top_k: int

    def scores(self, batch: Batch, scores: TokenScores) -> Tensor:
        """Returns the scores [N], for which both whole distributions are compared."""
        found = scores.comparison(self.top_k)
        divergence, mass = map(batch.by_completion, (found.forward_kl, found.teacher_mass))
        parts = [
            _between_quantiles(kl) * _between_quantiles(share)
            for kl, share in zip(divergence, mass, strict=True)
        ]
        return torch.cat([found.forward_kl[:0], *parts])


def _between_quantiles(values: Tensor) -> Tensor:
    """Returns values [n], n >= 1, as the fraction of the way from their 5% to 95% quantile."""
    low, high = values.quantile(values.new_tensor([0.05, 0.95]))
    return ((values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)).clamp(0, 1)


@dataclass(frozen=True)
class Selected(Objective):
    """`objective` with the weights of each completion's tokens, on those that a selection keeps.

    Weights and scores are made of all trained tokens under the full softmax, for further head
    matmuls; the objective's own matmuls are over the kept tokens only.
    """

    objective: Sampled | FullVocab
    selection: Selection | None = None
    weights: Drift | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        head: Head,
        batch: Batch,
        reward: Reward,
        token_weight: Tensor | float,
    ) -> tuple[Tensor, TokenRecord]:
        """Returns the loss of the kept tokens of a micro-batch, and their record."""
        own = self.objective
        scores = TokenScores(hidden_states, head, batch, own.teacher_head, own.merged_ids)
        token_weights = factors(token_weight, batch)
        if self.weights is not None:
            token_weights = token_weights * self.weights.of(batch, scores)
        if self.selection is None:
            return own(hidden_states, head, batch, reward, token_weights)
        tokens = self.selection.choose(batch, scores)
        kept = hidden_states.index_select(0, tokens)
        return own(kept, head, batch.select(tokens), reward, token_weights[tokens])

    def num_tokens(self, lengths: Iterable[int]) -> int:
        """Returns how many tokens are kept, of completions with so many in their masks."""
        if self.selection is None:
            return super().num_tokens(lengths)
        return int(self.selection.counts(torch.tensor(list(lengths), dtype=torch.long)).sum())


def selected(
    objective: Sampled | FullVocab,
    select: Mapping[str, object] | None,
    weights: Mapping[str, object] | None,
) -> Objective:
    """Returns an objective with the selection and the weights of a recipe, if it has any.

    Both are given by their `name` in their table, and parameters, of which each takes its own.
    """
    if select is None and weights is None:
        return objective
    selection = _from_table("objective.select.name", SELECTIONS, select)
    return Selected(objective, selection, _from_table("objective.weights.name", WEIGHTS, weights))


def _from_table(key: str, table: Mapping[str, str], settings: Mapping[str, object] | None) -> Any:
    """Returns the object that settings name, or None without any."""
    if settings is None:
        return None
    kind = import_object(key, table[str(settings["name"])])
    return kind(**{field.name: settings[field.name] for field in fields(kind)})
