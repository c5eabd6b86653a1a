"""Reads gold answers, however they are written: the one reader for files, recipes and rewards."""

import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from numbers import Real

from poweropd.grading.answers import boxed
from poweropd.grading.brackets import top_level
from poweropd.grading.notation import normalise

#: GSM8K ends its worked solutions by a line with four hashes and the answer.
_HASHES = "####"
#: Longer golds are not read, which could take long: only their very text equals them.
LONGEST_GOLD = 5_000


def read_gold(value: object) -> str:
    """Returns the gold answer that a value states, as text.

    value: a number; text, which may be GSM8K's (`... #### 4`) or a worked solution that ends in a
        box; or a list of these, which are joined by commas, or by semicolons if one has commas.

    Raises ValueError for any other value and for one that states nothing; the message goes on after
    "expected text, a number or a list of them, ".
    """
    if isinstance(value, str):
        return _from_text(value)
    if isinstance(value, (list, tuple)):
        answers = [read_gold(one) for one in _leaves(value)]
        if not answers:
            raise ValueError("got an empty list")
        several = any(_has_commas(one) for one in answers)
        return ("; " if several and len(answers) > 1 else ", ").join(answers)
    if isinstance(value, (Real, Decimal)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"got {value}")
        return str(value)
    if value is None:
        raise ValueError("got nothing")
    raise ValueError(f"got {value!r:.80}, which is {type(value).__name__}")


def _has_commas(answer: str) -> bool:
    """Returns whether an answer has commas outside brackets; in a very long one, any at all."""
    if len(answer) > LONGEST_GOLD:
        return "," in answer
    return len(list(top_level(normalise(answer), (",",)))) > 1


def _leaves(values: Iterable[object]) -> Iterator[object]:
    """Yields the elements of a list and of the lists in it."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _from_text(text: str) -> str:
    """Returns what follows GSM8K's hashes, else the content of the last box, else the text."""
    text = text.strip()
    _, hashes, answer = text.rpartition(_HASHES)
    if hashes and "\n" not in answer.strip():  # Otherwise it is the heading of a section.
        text = answer.strip()
        if not text:
            raise ValueError(f"got nothing after its {_HASHES}")
    in_box = boxed(text) if "box" in text else None
    if in_box == "":
        raise ValueError("got an empty box")
    if not text:
        raise ValueError("got nothing")
    return in_box or text
