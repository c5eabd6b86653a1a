"""The graders `exact` and `contains`: answers that are words, such as the labels of classes."""

import math
import re
from collections.abc import Mapping
from concurrent.futures import Future
from decimal import Decimal
from numbers import Real

from poweropd.grading import answers, rules
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders.base import Asked, Plain, graded
from poweropd.grading.graders.stated import comparable, readings, shown_answer, statement

Golds = str | list[str]


class Exact(Plain):
    """Compares the stated answer as text: without case, quotes, markup around it and final dot."""

    expected = "text in {}, a number, or a list of the answers that are right"

    def gold(self, value: object, row: Mapping[str, object]) -> Golds:
        """Returns the text, or the list of texts of which each is right."""
        return text_golds(value)

    def submit(self, workers: Grader, asked: Asked, completion: str) -> "Future[Grade]":
        """Grades at once; the answer is looked for in a box, after `Answer:`, and in one line."""
        text = answers.final_part(completion)
        wanted = {comparable(gold): gold for gold in as_list(asked.gold)}
        if comparable(text) in wanted:  # also golds of several lines
            return graded(rules.CORRECT, wanted[comparable(text)])
        found = statement(text)
        if found is None:
            return graded(rules.NO_ANSWER, None)
        right = next((one for one in readings(found) if comparable(one) in wanted), None)
        if right is None:
            return graded(rules.WRONG, shown_answer(found))
        return graded(rules.CORRECT, shown_answer(right))


class Contains(Plain):
    """Looks for the gold anywhere in the completion, as whole words, without case."""

    expected = Exact.expected

    def gold(self, value: object, row: Mapping[str, object]) -> Golds:
        """Returns the text, or the list of texts of which each is right."""
        return text_golds(value)

    def submit(self, workers: Grader, asked: Asked, completion: str) -> "Future[Grade]":
        """Grades at once; an empty completion has no answer."""
        text = comparable(answers.final_part(completion))
        for gold in as_list(asked.gold):
            wanted = re.escape(comparable(gold))
            if re.search(rf"(?<!\w){wanted}(?!\w)", text):
                return graded(rules.CORRECT, gold)
        return graded(rules.WRONG, "") if text else graded(rules.NO_ANSWER, None)


def as_list(gold: object) -> list[str]:
    """Returns the golds of which each is right."""
    return [str(one) for one in gold] if isinstance(gold, list) else [str(gold)]


def text_golds(value: object) -> Golds:
    """Returns a gold text, or a list of them; raises ValueError for anything else."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("got an empty list")
        return [_text_gold(one) for one in value]
    return _text_gold(value)


def _text_gold(value: object) -> str:
    if value is None:
        raise ValueError("got nothing")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Real | Decimal):
        if not math.isfinite(value):
            raise ValueError(f"got {value}")
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"got {value!r:.80}, which is {type(value).__name__}")
    if not comparable(value):
        raise ValueError("got nothing" if not value.strip() else f"got {value!r:.80}")
    return value.strip()
