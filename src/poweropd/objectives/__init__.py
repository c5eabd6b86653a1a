"""Objectives: what a student is trained to minimise."""

from poweropd.objectives.full_vocab import FullVocab
from poweropd.objectives.sampled import Sampled
from poweropd.objectives.selection import SELECTIONS

__all__ = ["OBJECTIVES", "SELECTIONS"]

OBJECTIVES: dict[str, type[Sampled] | type[FullVocab]] = {
    "sampled": Sampled,
    "full_vocab": FullVocab,
}
