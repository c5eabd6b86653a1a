"""Which objective a recipe has."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poweropd.kernels import Head, Support
from poweropd.objectives.base import Objective
from poweropd.objectives.full_vocab import FullVocab
from poweropd.objectives.sampled import Sampled
from poweropd.objectives.selection import Selected, Selection
from poweropd.rewards import Reward

MakeObjective = Callable[[Reward, float], Objective]


@dataclass(frozen=True)
class Maker:
    """Makes a step's objective from its reward and token weight, and counts what it trains on."""

    make: MakeObjective
    selection: Selection | None = None
    teacher_head: Head | None = None
    merged_ids: Tensor | None = None

    def __call__(self, reward: Reward, token_weight: float) -> Objective:
        objective = self.make(reward, token_weight)
        if self.selection is None:
            return objective
        return Selected(objective, self.selection, self.teacher_head, self.merged_ids)

    def num_tokens(self, lengths: Iterable[int]) -> int:
        """Tokens that are trained on of completions with so many in their loss masks."""
        every = torch.tensor(list(lengths), dtype=torch.long)
        return int((every if self.selection is None else self.selection.counts(every)).sum())


SAMPLED = Maker(Sampled)


def maker(
    kind: str,
    teacher_head: Head | None = None,
    *,
    baseline: bool = False,
    correction: bool = False,
    top_k: int | None = None,
    merged_ids: Tensor | None = None,
    support: Support | None = None,
    selection: Selection | None = None,
) -> Maker:
    """How to make the objective `kind`; `teacher_head` where the teacher reads along."""
    shared: dict[str, Any] = {
        "teacher_head": teacher_head,
        "merged_ids": merged_ids,
        "support": support,
    }
    kinds: dict[str, MakeObjective] = {
        "sampled": partial(Sampled, baseline=baseline, correction=correction, **shared),
        "full_vocab": partial(FullVocab, top_k=top_k, **shared),
    }
    return Maker(kinds[kind], selection, teacher_head, merged_ids)
