"""The interface of every rollout engine, and the randomness that belongs to a completion."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from poweropd.data.rollout import Request, Rollout
from poweropd.models.language_model import Student

Weights = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. top_k = 0 and top_p = 1 keep the whole vocabulary."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def of(self, request: Request) -> "Sampling":
        """Returns how one completion is sampled, which may have fewer tokens than others."""
        own = self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        return replace(self, max_new_tokens=min(own, self.max_new_tokens))


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples from the current student. Any object with these three members is an engine.

    `concurrent` says whether it may sample, in another thread, while the student's weights change.
    Such an engine has a copy of its own, which only `sync` replaces.
    """

    concurrent: bool

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        """Yields one rollout per request as it ends, in any order.

        A rollout holds its request as it was given. In a completion of several turns, tokens that
        the environment wrote (a tool's answer, the next user turn) are part of `completion_ids`
        like any others, and False in `completion_mask`: student and teacher read them, nothing is
        trained on them, and their entries in `sampling_log_probs` are ignored.
        """

    def sync(self) -> None:
        """Takes over the student's weights as they are now; all processes call it."""


def completion_seed(seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """Returns a 63-bit seed that depends on these four numbers alone.

    So a completion does not depend on batching, process count or resume.
    """
    key = f"{seed}/{step}/{prompt_index}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def shared_weights(student: Student) -> Iterator[tuple[str, Tensor]]:
    """Yields the gathered weights in the checkpoint's names, without padding.

    Embeddings and head are cut to the ids that the student shares with the teacher.
    """
    kept = torch.tensor(student.kept_ids()) if student.masked_ids else slice(student.vocab_size)
    causal_lm = student.causal_lm
    tables = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    cut = {id(parameter) for table in tables for parameter in table.parameters()}
    named = causal_lm.named_parameters(remove_duplicate=False)
    names = {name for name, parameter in named if id(parameter) in cut}
    for name, tensor in student.gathered_weights():
        yield name, tensor[kept] if name in names else tensor
