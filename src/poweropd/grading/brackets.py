"""Finds matching brackets and splits text outside of them."""

import re
from collections.abc import Iterator
from functools import lru_cache

_BRACKET = re.compile(r"\\begin\{|\\end\{|\\[{}]|\\\||[()\[\]{}]")
#: Change of depth by token. `\begin{` has a brace of its own, which closes after the name.
_DEPTHS = {"\\begin{": 2, "\\end{": 0} | dict.fromkeys(("(", "[", "{", "\\{"), 1)
_DEPTHS |= dict.fromkeys((")", "]", "}", "\\}"), -1)


@lru_cache
def _separating(separators: tuple[str, ...]) -> re.Pattern[str]:
    patterns = [re.escape(s) + ("(?![A-Za-z])" if s[-1].isalpha() else "") for s in separators]
    return re.compile("|".join([_BRACKET.pattern, *patterns]))


def top_level(text: str, separators: tuple[str, ...]) -> Iterator[str]:
    """Yields the pieces between separators outside all brackets; `(1, 2]` counts as bracketed."""
    depth, start = 0, 0
    for match in _separating(separators).finditer(text):
        token = match.group()
        if token in separators:
            if depth == 0:
                yield text[start : match.start()]
                start = match.end()
        else:
            depth = max(0, depth + _DEPTHS.get(token, 0))
    yield text[start:]


def closing(text: str, start: int) -> int:
    """Returns the index at which the bracket that opens at `start` closes, or -1."""
    depth = 0
    for match in _BRACKET.finditer(text, start):
        depth += _DEPTHS.get(match.group(), 0)
        if depth == 0:
            return match.end() - 1
    return -1
