"""Finds the answer that a completion states in words, and writes texts so that they compare.

Every search is linear in the text: no pattern goes back over a run of characters it has read.
"""

import re
import unicodedata
from collections import deque
from collections.abc import Iterator

from poweropd.grading import answers

# Of `**Answer:** refund`, `Final answer: refund`, `### Answer` and a line below it: at the
# beginning of a line, where it is meant as a mark.
_MARKED = re.compile(
    r"^[ \t>*_#\-\"'`]*(?:(?:the|my|final|correct|best|right)[ \t]+){0,3}answer"
    r"[ \t*_`\"']*(?::[ \t*_`]*|$)",
    re.IGNORECASE | re.MULTILINE,
)
# Of `The correct answer is: (B).` within a sentence.
_SAID = re.compile(r"\banswer\b[^\n.:?!]{0,60}?(?:\bis\b[ \t]*:?|:|=)", re.IGNORECASE)
_LATEX = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]{0,400})\}")
_SENTENCE = re.compile(r"[.!?。](?=\s)")
_EDGES = " \t\r\n*`\"'“”„‘’«»‹›"
_MOST_STATEMENTS = 8
_MOST_LAYERS = 4  # of markup around each other


def comparable(text: str) -> str:
    """Returns a text without case, quotes, surrounding markup, final dot and doubled spaces."""
    text = _LATEX.sub(r"\1", unicodedata.normalize("NFC", text))
    for _ in range(_MOST_LAYERS):
        text = text.strip(_EDGES)
        text = text[:-1] if text.endswith((".", "。")) and text.strip(".。") else text
        for mark in ("__", "_", "$"):
            inner = text[len(mark) : len(text) - len(mark)]
            if text.startswith(mark) and text.endswith(mark) and inner:
                text = inner
    return " ".join(text.casefold().split())


def shown_answer(text: str) -> str:
    """Returns an answer without the markup around it, in the case in which it was written."""
    text = text.strip(_EDGES)
    return text[:-1].rstrip(_EDGES) if text.endswith((".", "。")) and text.strip(".。") else text


def statement(text: str) -> str | None:
    """Returns the words in which the final part of a completion states its answer.

    It is the content of its last box, else what follows its last `Answer:`, else its last "answer
    is", else its only line; None if it has none of these.
    """
    box = answers.boxed(text) if "box" in text else None
    if box:
        return box
    for pattern in (_MARKED, _SAID):
        for match in reversed(deque(pattern.finditer(text), maxlen=_MOST_STATEMENTS)):
            line = text[match.end() :].lstrip().partition("\n")[0]
            if comparable(line):
                return line
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else None


def readings(line: str) -> Iterator[str]:
    """Yields a line, its first sentence, and that without a reason ("refund because ...")."""
    yield line
    sentence = _SENTENCE.split(line, maxsplit=1)[0]
    yield sentence
    yield answers.AFTERTHOUGHT.sub("", sentence)
