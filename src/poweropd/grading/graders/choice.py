"""The grader `choice`: the letter of an option, as in MMLU, ARC, HellaSwag and their like."""

import re
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import takewhile

from poweropd.grading import answers, rules
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders.base import Asked, graded
from poweropd.grading.graders.stated import comparable, shown_answer, statement

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: Columns that hold the options, where no other one is named.
OPTION_COLUMNS = ("choices", "options", "endings")
_OPEN = r"[\s*_`\"'“”‘’$>#\-]*(?:(?:option|choice|letter|answer)\b[\s:*_]*)?(?:\\\w+\s*\{)?"
# A letter in brackets or with a mark behind it, and what follows it.
_MARKED = re.compile(
    rf"{_OPEN}(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])(?=[\s*_`\"'”’$}}]*[).:\]](?!\w)))(.*)",
    re.IGNORECASE | re.DOTALL,
)
_BARE = re.compile(rf"{_OPEN}([A-Za-z])(?![\w'’])(.*)", re.IGNORECASE | re.DOTALL)
_SAID_OPTION = re.compile(r"\b(?:option|choice|letter)\b[^\n.:?!]{0,60}?\bis\b:?", re.IGNORECASE)
_LETTERED = re.compile(r"\s*\(?([A-Za-z])[).:]\s*(?=\S)")
_NOTHING = re.compile(r"[\s*_`\"'“”‘’$}.):\]]*")
_REASON = re.compile(
    r"[\s*_`\"'”’$}]*(?:[,;–—(-]|(?:because|since|as|for|which|that)\b"
    r"|is (?:the )?(?:correct|right|best|answer)\b)",
    re.IGNORECASE,
)
_AND_ANOTHER = re.compile(
    r"[\s*_`\"'”’$}).\]]*(?:,|/|&|\+|\band\b|\bor\b)\s*[(\[*]*([A-Za-z])(?![\w'’])", re.IGNORECASE
)


class Choice:
    """Compares the letter of the stated option; the option's text counts as its letter.

    column: names the options. Without it they are in `choices`, `options` or `endings`, as a list
    or as `{text, label}`, or in columns A, B, C or option_a, option_b; or only the problem's text
    has them.
    """

    needs_gold = True
    expected = "a letter in {}, or the number (from 0) or the text of one of the row's options"

    def __init__(self, column: str | None = None) -> None:
        self.column = column

    def gold(self, value: object, row: Mapping[str, object]) -> str:
        """Returns the letter; raises ValueError for a value that names none of the options."""
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        labels, texts = self.options(row)
        if isinstance(value, str):
            return _letter_of(value.strip(), labels, texts)
        if isinstance(value, int) and not isinstance(value, bool):
            if value in range(len(texts)):
                return LETTERS[value]
            raise ValueError(f"got {value} and {len(texts)} options{_where(self.column)}")
        raise ValueError("got nothing" if value is None else f"got {value!r:.80}")

    def question(self, text: str, row: Mapping[str, object]) -> str:
        """Returns the problem followed by its options with letters, unless its text has them."""
        _, options = self.options(row)
        if not options or all(option in text for option in options):
            return text
        lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        return "\n".join([text, *lines])

    def options(self, row: Mapping[str, object]) -> tuple[list[str], list[str]]:
        """Returns the labels and the texts of a row's options, both empty if it has none.

        Raises ValueError for a column that holds no options.
        """
        found = [name for name in OPTION_COLUMNS if isinstance(row.get(name), list | Mapping)]
        column = self.column or (found[0] if found else None)
        if column is None:
            texts = [str(row[name]) for name in _letter_columns(row)]
            return list(LETTERS[: len(texts)]), texts
        value = row.get(column)
        texts, labels = _read_options(value)
        if not 2 <= len(texts) <= len(LETTERS):
            got = f"{value!r:.80}" if column in row else "none"
            raise ValueError(f"and a list of 2 to 26 options in column {column!r}: got {got}")
        return labels if len(labels) == len(texts) else list(LETTERS[: len(texts)]), texts

    def submit(self, workers: Grader, asked: Asked, completion: str) -> "Future[Grade]":
        """Grades at once; a completion that names several options answers, and is wrong."""
        _, texts = self.options(asked.row)
        options = {comparable(option): LETTERS[i] for i, option in enumerate(texts)}
        text = answers.final_part(completion)
        found = statement(text)
        answer = None if found is None else read_choice(found, options)
        if answer is None and (said := deque(_SAID_OPTION.finditer(text), maxlen=1)):
            answer = read_choice(text[said[0].end() :].partition("\n")[0], options)
        if answer is None:
            answer = _only_letter(text, options)
        if answer is None:
            return graded(rules.NO_ANSWER, None)
        return graded(rules.CORRECT if answer == asked.gold else rules.WRONG, answer)


def _read_options(value: object) -> tuple[list[str], list[str]]:
    """Returns the texts of options and, if they are given, their labels; both empty for others."""
    labels: list[str] = []
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):  # as ARC has them
        given = value.get("label")
        labels = [str(one) for one in given] if isinstance(given, list) else []
        value = value["text"]
    elif isinstance(value, Mapping):  # letter -> text, as MedQA has them
        labels, value = [str(key) for key in value], list(value.values())
    if not isinstance(value, list) or not all(isinstance(o, str | int | float) for o in value):
        return [], []
    texts = [str(option) for option in value]
    lettered = [_LETTERED.match(text) for text in texts]  # A)21, as AQuA has them
    if all(m and m[1].upper() == letter for m, letter in zip(lettered, LETTERS, strict=False)):
        texts = [text[match.end() :] for text, match in zip(texts, lettered, strict=True) if match]
    return texts, labels


def _where(column: str | None) -> str:
    return f" in column {column!r}" if column else ""


def _letter_columns(row: Mapping[str, object]) -> list[str]:
    """Returns the columns A, B, C or option_a, option_b, option_c and on that hold text.

    One alone holds no options.
    """
    for form in (LETTERS, [f"option_{letter.lower()}" for letter in LETTERS]):
        names = list(takewhile(lambda name: isinstance(row.get(name), str), form))
        if len(names) > 1:
            return names
    return []


def _letter_of(gold: str, labels: Sequence[str], texts: Sequence[str]) -> str:
    """Returns the letter that a gold text means: a label, a letter, an option or its number."""
    if gold in labels:
        return LETTERS[labels.index(gold)]
    same = [i for i, text in enumerate(texts) if comparable(text) == comparable(gold)]
    if len(same) == 1 and not (gold.isalpha() and len(gold) == 1):
        return LETTERS[same[0]]
    letter = read_choice(gold, {})
    if letter is not None and len(letter) == 1 and (not texts or letter in LETTERS[: len(texts)]):
        return letter
    if len(same) == 1:
        return LETTERS[same[0]]
    if gold.isdecimal() and int(gold) < len(texts):
        return LETTERS[int(gold)]
    if not gold:
        raise ValueError("got nothing")
    raise ValueError(f"got {gold!r:.80}" + (f" and {len(texts)} options" if texts else ""))


def read_choice(text: str, by_text: Mapping[str, str]) -> str | None:
    """Returns the letter that a statement gives, the text if it gives several, or None.

    by_text: an option's text, as `comparable` writes it -> its letter.
    """
    if (letter := by_text.get(comparable(text))) is not None:
        return letter
    for pattern in (_MARKED, _BARE):
        match = pattern.match(text)
        if match is None:
            continue
        *letters, rest = match.groups()
        written = next(letter for letter in letters if letter)
        another = _AND_ANOTHER.match(rest)
        if another is not None and another[1].upper() != written.upper():
            return shown_answer(text)
        alone = _NOTHING.fullmatch(rest) or by_text.get(comparable(rest)) == written.upper()
        if alone or pattern is _MARKED or (written.isupper() and _REASON.match(rest)):
            return written.upper()
    return None


def _only_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Returns the one letter with which lines begin that give an answer, as "B. Paris" does.

    Several letters are a list of the options rather than an answer.
    """
    found = set()
    for line in text.splitlines():
        match = _MARKED.match(line) or _BARE.match(line)
        if match is not None and (match.re is _MARKED or _NOTHING.fullmatch(match.groups()[-1])):
            found.add(read_choice(line, options))
    return found.pop() if len(found) == 1 else None
