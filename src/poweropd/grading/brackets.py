"""Finds matching brackets and splits text outside of them."""

import re
from collections.abc import Iterator
from functools import lru_cache

_DEPTHS = re.compile(r"\\begin\{|\\end\{|\\[{}]|\\\||[()\[\]{}]")


@lru_cache
def _separating(separators: tuple[str, ...]) -> re.Pattern[str]:
    patterns = [re.escape(s) + ("(?![A-Za-z])" if s[-1].isalpha() else "") for s in separators]
    return re.compile("|".join([_DEPTHS.pattern, *patterns]))


def top_level(text: str, separators: tuple[str, ...]) -> Iterator[str]:
    """The pieces between separators outside all brackets; half-open intervals count as brackets."""
    pattern = _separating(separators)
    depth, start = 0, 0
    for match in pattern.finditer(text):
        token = match.group()
        if token in separators:
            if depth == 0:
                yield text[start : match.start()]
                start = match.end()
        else:
            depth = max(0, depth + _step(token))
    yield text[start:]


def _step(token: str) -> int:
    if token in ("\\begin{", "(", "[", "{", "\\{"):
        # `\begin{` and `\end{` carry a brace of their own, which closes after the name.
        return 2 if token == "\\begin{" else 1
    if token == "\\end{":
        return 0
    return -1 if token in (")", "]", "}", "\\}") else 0


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes: its last character's index, or -1."""
    depth = 0
    for match in _DEPTHS.finditer(text, start):
        depth += _step(match.group())
        if depth == 0:
            return match.end() - 1
    return -1
