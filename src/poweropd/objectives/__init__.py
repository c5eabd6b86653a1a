"""Objectives: what a student is trained to minimise."""

from collections.abc import Callable

from poweropd.objectives.base import Objective
from poweropd.objectives.full_vocab import FullVocab
from poweropd.objectives.sampled import Sampled
from poweropd.objectives.selection import SELECTIONS

__all__ = ["OBJECTIVES", "SELECTIONS"]

#: Name of `objective.kind` -> what makes that objective.
OBJECTIVES: dict[str, Callable[..., Objective]] = {"sampled": Sampled, "full_vocab": FullVocab}
