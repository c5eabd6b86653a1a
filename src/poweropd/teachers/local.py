"""A teacher in this process: one forward without a cache, batched under its own token budget."""

from poweropd.batching import Example, pack, teacher_sequences
from poweropd.models import Teacher


class LocalTeacher:
    """Scores with a `Teacher` module; `max_tokens` bounds the padded tokens of one forward."""

    def __init__(self, teacher: Teacher, max_tokens: int) -> None:
        self.teacher, self.max_tokens = teacher, max_tokens
        self._waiting: list[Example] = []

    def submit(self, example: Example) -> None:
        self._waiting.append(example)  # batches of like length need them all

    def collect(self) -> list[Example]:
        waiting, self._waiting = self._waiting, []
        scored = list(waiting)
        for group in pack([e.teacher_length for e in waiting], self.max_tokens):
            members = [waiting[i] for i in group]
            found = self.teacher.score(teacher_sequences(members).to(self.teacher.device))
            counts = [e.num_tokens for e in members]
            # A clone made here is an ordinary tensor, not one of inference mode.
            columns = (
                tensor.cpu().clone().split(counts)
                for tensor in (found.student_log_probs, found.entropy, found.top1)
            )
            for i, log_probs, entropy, top1 in zip(group, *columns, strict=True):
                scored[i] = waiting[i].scored(log_probs, entropy, top1)
        return scored
