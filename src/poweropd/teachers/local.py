"""A teacher in this process, which scores in batches under a token budget of its own."""

import torch
from torch import Tensor

from poweropd.data.batch import Sequences, halved, pack, teacher_sequences
from poweropd.data.rollout import Example, TopIds
from poweropd.errors import RunError
from poweropd.models.language_model import Teacher


class LocalTeacher:
    """Scores with a `Teacher` module; `max_tokens` bounds the tokens of one forward.

    If memory runs out, all waiting examples are scored again at half the budget, so that scores do
    not depend on the moment at which it ran out. A teacher with an `offload_from` is on that device
    only while it scores and on the CPU otherwise. With a `top_k` it tells its so many most probable
    ids of each context, too.
    """

    def __init__(
        self,
        teacher: Teacher,
        max_tokens: int,
        offload_from: torch.device | None = None,
        top_k: int | None = None,
    ) -> None:
        self.teacher, self.max_tokens, self.offload_from = teacher, max_tokens, offload_from
        self.top_k = top_k
        self._waiting: list[Example] = []

    def submit(self, example: Example) -> None:
        self._waiting.append(example)  # batches of similar lengths need all of them

    def collect(self) -> list[Example]:
        waiting, self._waiting = self._waiting, []
        if self.offload_from is None:
            return self._within_memory(waiting)
        self.teacher.to(self.offload_from)
        try:
            return self._within_memory(waiting)
        finally:
            self.teacher.to("cpu")

    def _within_memory(self, waiting: list[Example]) -> list[Example]:
        """Scores, and after running out of memory scores again with a smaller budget."""
        while True:
            try:
                return self._scored(waiting)
            except torch.OutOfMemoryError as error:
                self._shrink([e.teacher_length for e in waiting], error)

    def _scored(self, waiting: list[Example]) -> list[Example]:
        """Returns the examples scored in batches of at most `max_tokens`."""
        scored = list(waiting)
        flat = self.teacher.flat
        for group in pack([e.teacher_length for e in waiting], self.max_tokens, flat):
            members = [waiting[i] for i in group]
            sequences = teacher_sequences(members, flat).to(self.teacher.device)
            counts = [e.num_tokens for e in members]
            # A clone made here is an ordinary tensor, not one of inference mode.
            columns = (tensor.cpu().clone().split(counts) for tensor in self._columns(sequences))
            for i, log_probs, entropy, top1, *top in zip(group, *columns, strict=True):
                top_ids = TopIds(*top) if top else None
                scored[i] = waiting[i].scored(log_probs, entropy, top1, top_ids)
        return scored

    def _columns(self, sequences: Sequences) -> list[Tensor]:
        """Returns log-probs, entropy and top1 of the N targets, then the two of `TopIds` if any."""
        if self.top_k is None:
            found, top = self.teacher.score(sequences), []
        else:
            found, told = self.teacher.score_top_k(sequences, self.top_k)
            top = [told.ids, told.log_probs]
        return [found.log_probs, found.entropy, found.top1, *top]

    def _shrink(self, lengths: list[int], error: torch.OutOfMemoryError) -> None:
        """Halves the budget; raises RunError if a single sequence does not fit."""
        smaller = halved(self.max_tokens, lengths)
        if smaller is None:
            raise RunError(
                f"out of memory in scoring with teacher.max_tokens_per_batch={self.max_tokens} "
                f"(longest sequence: {max(lengths)} tokens): lower rollout.max_new_tokens, or use "
                "a smaller teacher.dtype"
            ) from error
        self.max_tokens = smaller
        if self.teacher.device.type == "cuda":
            torch.cuda.empty_cache()
