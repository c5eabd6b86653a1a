"""A teacher in this process: one forward without a cache, batched under its own token budget."""

import torch

from poweropd.batching import Example, pack, teacher_sequences
from poweropd.models import Teacher


class LocalTeacher:
    """Scores with a `Teacher` module; `max_tokens` bounds the padded tokens of one forward.

    A teacher with an `offload_from` is on that device while it scores, else on the CPU.
    """

    def __init__(
        self, teacher: Teacher, max_tokens: int, offload_from: torch.device | None = None
    ) -> None:
        self.teacher, self.max_tokens, self.offload_from = teacher, max_tokens, offload_from
        self._waiting: list[Example] = []

    def submit(self, example: Example) -> None:
        self._waiting.append(example)  # batches of like length need them all

    def collect(self) -> list[Example]:
        waiting, self._waiting = self._waiting, []
        if self.offload_from is None:
            return self._scored(waiting)
        self.teacher.to(self.offload_from)
        try:
            return self._scored(waiting)
        finally:
            self.teacher.to("cpu")

    def _scored(self, waiting: list[Example]) -> list[Example]:
        scored = list(waiting)
        for group in pack([e.teacher_length for e in waiting], self.max_tokens):
            members = [waiting[i] for i in group]
            log_probs = self.teacher.log_probs(teacher_sequences(members).to(self.teacher.device))
            # A clone made here is an ordinary tensor, not one of inference mode.
            parts = log_probs.cpu().clone().split([e.num_tokens for e in members])
            for i, part in zip(group, parts, strict=True):
                scored[i] = waiting[i].scored(part)
        return scored
