"""The grader `package.module:function`: the user's own, called in this process."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import SupportsFloat

from poweropd.errors import RunError, one_line, shown
from poweropd.grading import rules
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders.base import Asked, Plain

MAIN_SCORE = "score"


class UserFunction(Plain):
    """Calls a function (row, completion) -> number, or mapping of names to numbers.

    The number is the score of the completion; it is correct from 1 on. Of a mapping, the score is
    `score` or, without that name, the first number; all the others are further scores.
    """

    needs_gold = False
    expected = "anything in {}"

    def __init__(
        self, key: str, named: str, function: Callable[[Mapping[str, object], str], object]
    ) -> None:
        self.called, self.function = f"{key} {named}", function
        self.names: list[str] | None = None  # of the further scores, as the first call gave them

    def gold(self, value: object, row: Mapping[str, object]) -> object:
        """Returns the value; what it means is the function's matter."""
        return value

    def submit(self, workers: Grader, asked: Asked, completion: str) -> "Future[Grade]":
        """Calls the function; raises RunError if it fails or returns something else."""
        place = f" for {asked.place}" if asked.place else ""
        try:
            value = self.function(asked.row, completion)
        except Exception as error:  # the user's code may raise anything, and the run ends with it
            reason = one_line(f"{type(error).__name__}: {error}")[:300]
            raise RunError(f"{self.called}: it raised {reason}{place}") from error
        scores = self._scores(value, place)
        named = MAIN_SCORE in scores
        score = scores.pop(MAIN_SCORE) if named else scores.pop(next(iter(scores)))
        future: Future[Grade] = Future()
        right = score >= 1.0
        reason = rules.CORRECT if right else rules.WRONG
        future.set_result(Grade(right, "", reason, score=score, scores=scores))
        return future

    def _scores(self, value: object, place: str) -> dict[str, float]:
        """Returns name -> number; a number alone is the score."""
        several = isinstance(value, Mapping)
        pairs = dict(value) if isinstance(value, Mapping) else {MAIN_SCORE: value}
        scores = {str(name): finite_number(one) for name, one in pairs.items()}
        if not scores:
            raise RunError(f"{self.called}: expected at least one number, got {{}}{place}")
        for name, score in scores.items():
            if score is None:
                which = f" as {name!r}" if several else ""
                got = shown(pairs[name]) if name in pairs else "another"
                raise RunError(f"{self.called}: expected a finite number{which}, got {got}{place}")
        if self.names is None:
            self.names = list(scores)
        if set(scores) != set(self.names):
            raise RunError(
                f"{self.called}: expected the scores {', '.join(self.names)}, as for the first "
                f"completion, got {', '.join(scores)}{place}"
            )
        return {name: score for name in self.names if (score := scores[name]) is not None}


def finite_number(value: object) -> float | None:
    """Returns a finite number as a float, also one of numpy or torch; None for anything else."""
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # arrays of several numbers
        return None
    return number if math.isfinite(number) else None
