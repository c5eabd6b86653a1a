"""Looks at a file of prompts: its columns, its gold answers, and how long its prompts are."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from poweropd.data.messages import Conversation, read_conversation
from poweropd.data.prompts import AUTO_COLUMNS
from poweropd.data.sources import Row, column_names, placed_rows, value_at
from poweropd.errors import UsageError
from poweropd.grading.golds import read_gold

LOOKED_AT = 1000  # rows whose values are read; all rows are counted
SHORT = 60  # characters: longer golds are references, not answers to compare with
FEW = 50  # different values that a column of categories has at most
LETTERS = frozenset("ABCDEFGHIJ")
ANSWER_COLUMNS = (
    *("answer", "reward_model.ground_truth", "final_answer", "gold", "label", "category"),
    *("target", "solution", "expected", "class", "intent"),
)


@dataclass(frozen=True)
class Survey:
    """What a file of prompts holds.

    answer, grader: the column of gold answers and how they can be compared; None without one.
    guessed: whether no column has a known name, and `column` is the one with the longest texts.
    """

    source: str
    count: int  # rows
    column: str
    guessed: bool
    prompts: list[Conversation]  # the first ones
    answer: str | None
    grader: str | None


def survey(source: str, split: str, column: str | None = None) -> Survey:
    """Reads a source of rows; raises UsageError if it cannot be read or holds no prompts."""
    rows = placed_rows(source, split)
    first = list(islice(rows, LOOKED_AT))
    if not first:
        raise UsageError(f"{source}: expected at least one row, got none")
    count = len(first) + sum(1 for _ in rows)
    known = next((name for name in AUTO_COLUMNS if name in first[0][1]), None)
    own = [row for _, row in first]
    chosen = column or known or _longest_text(source, own)
    prompts = [read_conversation(row, chosen, place) for place, row in first]
    answer, grader = _answers(own, chosen)
    return Survey(source, count, chosen, known is None and column is None, prompts, answer, grader)


def _longest_text(source: str, rows: Sequence[Row]) -> str:
    """Returns the column of text whose values are the longest ones."""
    lengths = {
        name: statistics.median(len(str(row.get(name, ""))) for row in rows)
        for name, value in rows[0].items()
        if isinstance(value, str) and name not in ANSWER_COLUMNS
    }
    if not lengths:
        raise UsageError(
            f"{source}: expected a column with the prompts' text or messages, its columns are "
            f"{column_names(rows[0])}: name it with --column"
        )
    return max(lengths, key=lengths.__getitem__)


def _answers(rows: Sequence[Row], prompt_column: str) -> tuple[str | None, str | None]:
    """Returns the column of gold answers and its grader, or None twice."""
    for name in ANSWER_COLUMNS:
        values = [_value(row, name) for row in rows]
        if name != prompt_column and all(value is not None for value in values):
            grader = next((grader for grader, fits in _GRADERS.items() if fits(values)), None)
            if grader is not None:
                return name, grader
    return None, None


def _value(row: Row, name: str) -> Any:
    try:
        return value_at(row, name)
    except KeyError:
        return None


def _is_mathematics(values: Sequence[Any]) -> bool:
    """Returns whether most golds are numbers or formulas."""
    texts = [_gold(value) for value in values]
    formulas = [t for t in texts if t and any(c.isdigit() or c in "\\^" for c in t)]
    return len(formulas) > len(texts) / 2 and _are_short(texts)


def _gold(value: Any) -> str:
    try:
        return read_gold(value)
    except ValueError:
        return ""


def _are_letters(values: Sequence[Any]) -> bool:
    return all(isinstance(v, str) and v.strip().upper() in LETTERS for v in values)


def _are_objects(values: Sequence[Any]) -> bool:
    return all(isinstance(v, dict) or (isinstance(v, str) and _is_object(v)) for v in values)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _are_categories(values: Sequence[Any]) -> bool:
    texts = [str(value) for value in values]
    return _are_short(texts) and len(set(texts)) <= min(FEW, max(2, len(texts) // 3))


def _are_short(texts: Sequence[str]) -> bool:
    return statistics.median(map(len, texts)) <= SHORT


#: Grader -> whether all of a column's values suit it; the first that fits is taken.
_GRADERS: dict[str, Callable[[Sequence[Any]], bool]] = {
    "choice": _are_letters,
    "json": _are_objects,
    "math": _is_mathematics,
    "exact": _are_categories,
}
