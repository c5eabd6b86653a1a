"""Looks at a file of prompts: its columns, its gold answers, and how long its prompts are."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from poweropd.data.messages import Conversation, read_conversation
from poweropd.data.prompts import AUTO_COLUMNS
from poweropd.data.sources import Row, column_names, find_value, placed_rows
from poweropd.errors import UsageError, shown
from poweropd.grading.golds import read_gold

LOOKED_AT = 1000  # rows whose values are read; all rows are counted
SHORT = 60  # characters: longer golds are references, not answers to compare with
FEW = 50  # different values that a column of categories has at most
LETTERS = frozenset("ABCDEFGHIJ")
_SIGNS = re.compile(r"[\d\\^]")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")  # and no command of LaTeX
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
    columns: list[str]
    column: str
    guessed: bool
    prompts: list[Conversation]  # the first ones
    answer: str | None
    grader: str | None


def survey(source: str, split: str, column: str | None = None, answer: str | None = None) -> Survey:
    """Reads a source of rows, whose columns may be named.

    Raises UsageError if it cannot be read, holds no prompts, or lacks what was named.
    """
    rows = placed_rows(source, split)
    first = list(islice(rows, LOOKED_AT))
    if not first:
        raise UsageError(f"{source}: expected at least one row, got none")
    count = len(first) + sum(1 for _ in rows)
    own = [row for _, row in first]
    known = next((name for name in AUTO_COLUMNS if name in own[0]), None)
    chosen = column or known or _longest_text(source, own)
    prompts = [read_conversation(row, chosen, place).cut() for place, row in first]
    gold, grader = _named_answer(first, answer) if answer else _found_answer(own, chosen)
    columns, guessed = list(own[0]), known is None and column is None
    return Survey(source, count, columns, chosen, guessed, prompts, gold, grader)


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


def _named_answer(rows: Sequence[tuple[str, Row]], name: str) -> tuple[str, str]:
    """Returns the column that the user named, and its grader; raises UsageError if none fits."""
    values = [find_value(row, name) for _, row in rows]
    if None in values:
        place, row = rows[values.index(None)]
        raise UsageError(
            f"{place}: expected a gold answer in column {name!r}, its columns are "
            f"{column_names(row)}"
        )
    grader = _grader(values) or ("exact" if _are_short([str(value) for value in values]) else None)
    if grader is None:
        raise UsageError(
            f"{rows[0][0]}: column {name!r}: expected short answers, got {shown(values[0])}; long "
            "ones need a grader of yours in the recipe, grader: module:function"
        )
    return name, grader


def _found_answer(rows: Sequence[Row], prompt_column: str) -> tuple[str | None, str | None]:
    """Returns the column of gold answers and its grader, or None twice."""
    for name in ANSWER_COLUMNS:
        values = [find_value(row, name) for row in rows]
        if name != prompt_column and None not in values:
            grader = _grader(values)
            if grader is not None:
                return name, grader
    return None, None


def _grader(values: Sequence[object]) -> str | None:
    """Returns the grader that all golds suit, or None."""
    return next((grader for grader, fits in _GRADERS.items() if fits(values)), None)


def _is_mathematics(values: Sequence[object]) -> bool:
    """Returns whether most golds are numbers or formulas."""
    texts = [_gold(value) for value in values]
    formulas = [t for t in texts if _SIGNS.search(t) and not _WORD.search(t)]
    return len(formulas) > len(texts) / 2 and _are_short(texts)


def _gold(value: object) -> str:
    try:
        return read_gold(value)
    except ValueError:
        return ""


def _are_letters(values: Sequence[object]) -> bool:
    return all(isinstance(v, str) and v.strip().upper() in LETTERS for v in values)


def _are_objects(values: Sequence[object]) -> bool:
    return all(isinstance(v, dict) or (isinstance(v, str) and _is_object(v)) for v in values)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _are_categories(values: Sequence[object]) -> bool:
    texts = [str(value) for value in values]
    return _are_short(texts) and len(set(texts)) <= min(FEW, max(2, len(texts) // 3))


def _are_short(texts: Sequence[str]) -> bool:
    return statistics.median(map(len, texts)) <= SHORT


#: Grader -> whether all of a column's values suit it; the first that fits is taken.
_GRADERS: dict[str, Callable[[Sequence[object]], bool]] = {
    "choice": _are_letters,
    "json": _are_objects,
    "math": _is_mathematics,
    "exact": _are_categories,
}
