"""What every teacher offers."""

from collections.abc import Iterable
from typing import Protocol

from poweropd.batching import Example


class TeacherScorer(Protocol):
    """Gives each trained token's log-probability under the teacher."""

    def score(self, examples: Iterable[Example]) -> list[Example]:
        """The examples with `teacher_log_probs`, in the order they came."""
