"""The interface of every teacher."""

from collections.abc import Iterable
from typing import Protocol

from poweropd.data.rollout import Example


class TeacherScorer(Protocol):
    """Gives each trained token's log-probability under the teacher."""

    def submit(self, example: Example) -> None:
        """Takes an example; a served teacher scores it while others are still being sampled."""

    def collect(self) -> list[Example]:
        """Returns all examples since the last call, in the order in which they were submitted.

        Each has its `teacher_log_probs` (float32, on the CPU). One of which nothing can be scored
        is left out.
        """


class Unscored:
    """Hands examples on as they are: the objective reads the teacher's hidden states itself."""

    def __init__(self) -> None:
        self._waiting: list[Example] = []

    def submit(self, example: Example) -> None:
        self._waiting.append(example)

    def collect(self) -> list[Example]:
        collected, self._waiting = self._waiting, []
        return collected


def score(teacher: TeacherScorer, examples: Iterable[Example]) -> list[Example]:
    """Returns the examples with the teacher's log-probs, in the order in which they came."""
    for example in examples:
        teacher.submit(example)
    return teacher.collect()
