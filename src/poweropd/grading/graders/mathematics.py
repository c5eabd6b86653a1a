"""The grader `math`: finds a final answer and compares it as mathematics."""

from collections.abc import Mapping
from concurrent.futures import Future

from poweropd.grading.golds import read_gold
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders.base import Asked, Plain


class Mathematics(Plain):
    """Compares numbers, formulas, lists and words; docs/grading.md says how."""

    expected = "text in {}, a number or a list of them"

    def gold(self, value: object, row: Mapping[str, object]) -> str:
        """Returns the answer that a gold states, as text."""
        return read_gold(value)

    def submit(self, workers: Grader, asked: Asked, completion: str) -> "Future[Grade]":
        """Returns a future of the grade, which never holds an exception."""
        return workers.submit(asked.gold, completion, rule=asked.rule)
