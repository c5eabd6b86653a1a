"""An answer's outer structure: lists, sets, tuples, intervals, unions, matrices, names."""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from poweropd.grading.brackets import closing, top_level
from poweropd.grading.notation import LOOSE_SPACE, normalise, words
from poweropd.grading.quantities import quantity

_CONNECTOR = re.compile(r",?(?<![A-Za-z\\])\s*(?:and|or)(?![A-Za-z])\s*,?", re.IGNORECASE)
_BOUND = re.compile(r"(<|>|\\[lg]e(?![A-Za-z]))")
_RISING = ("<", "\\le")
_VARIABLE = re.compile(r"\\?[A-Za-z]+|[A-Za-z]\([A-Za-z]\)|[A-Za-z]_ ?\{?\w\}?")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+")
_MATRIX = re.compile(
    r"\\begin\{(?:[pbvBV]?matrix|array|smallmatrix)\}(?:\{[^{}]*\})?((?:(?!\\begin).)*?)"
    r"\\end\{(?:[pbvBV]?matrix|array|smallmatrix)\}"
)

_ONE_CELL = re.compile(r"\[[^\[\](),]*\]")


@dataclass(frozen=True)
class Shape:
    """A text's outer structure.

    kind: `scalar`, `list`, `set`, `union`, `matrix`, or the brackets of a tuple or interval.
    """

    kind: str
    text: str
    items: tuple["Shape", ...] = ()


_NAME = (
    r"(?:\\(?:text|mathrm|angle|triangle|overline|overrightarrow|vec|hat|operatorname|dot|ddot) ?)*"
    r"(?:\{?\\?[A-Za-z]+(?:[ -][A-Za-z]+)*\}?|[A-Za-z])'*(?:_ ?(?:\{[^{}]*\}|\\?\w))?"
    r"'*(?:\^ ?\{? ?(?:\\prime|\*)+ ?\}?)?(?: ?\( ?[A-Za-z0-9, \\]+\))?"
)
_NAMES = re.compile(
    rf"(?:\|? ?{_NAME} ?\|?|\( ?{_NAME}(?: ?, ?{_NAME})* ?\)"
    r"|\\frac ?\{ ?[A-Z]\w* ?\} ?\{ ?[A-Z]\w* ?\}|\\frac ?\{ ?d[^{}=]*\} ?\{ ?d[^{}=]*\}"
    rf"|{_NAME} ?[:/] ?{_NAME})"
)
_ASSIGNMENT = re.compile(rf"({_NAMES.pattern}) ?(?:=|\\in(?![A-Za-z])|\\approx)(?![=]) ?(.+)")


def assignment(text: str) -> tuple[str | None, str]:
    """Splits `x = 3`, `f(x) = 2x` or `(x, y) = (1, 2)` into name and value, else (None, text)."""
    match = _ASSIGNMENT.fullmatch(text)
    if match and not match.group(1).startswith(("\\frac{1", "\\sqrt")):
        return LOOSE_SPACE.sub("", match.group(1)), match.group(2).strip()
    return None, text


def lists_several(gold: str) -> bool:
    """Returns whether a gold answer lists several, which may then come in several boxes."""
    text = normalise(gold)
    inside = text.removeprefix("\\").removeprefix("{") if text.endswith("}") else text
    inside = inside.removesuffix("}").removesuffix("\\") if inside != text else text
    return len(_expand(_items(_connected(inside)))) > 1 and quantity(text) is None


def grouped(text: str) -> Shape | None:
    """Reads digits with thousands commas, 120,180, as a list of numbers; None for other text."""
    if not _GROUPED.fullmatch(text):
        return None
    return Shape("list", text, tuple(Shape("scalar", part) for part in text.split(",")))


def _connected(text: str) -> str:
    """Writes "a and b" as "a, b", except in sentences."""
    return _CONNECTOR.sub(", ", text) if words(text) is None else text


@lru_cache(maxsize=4096)
def shape(text: str) -> Shape:
    """Returns the structure of a normalised text, split only at commas, brackets and unions."""
    text = _connected(text)
    items = _items(text)
    if len(items) > 1 and quantity(text) is not None and not re.search(r",\s|;", text):
        return Shape("scalar", text)  # a thousands comma
    elements = _expand([item.strip() for item in items])
    if len(elements) > 1:
        return Shape("list", text, tuple(map(shape, elements)))
    interval = _as_interval(text)
    if interval is not None:
        return interval
    name, value = assignment(text)
    if name is not None:
        inner = shape(value)
        return inner if inner.kind != "scalar" else Shape("scalar", text)
    parts = list(top_level(text, ("\\cup",)))
    if len(parts) > 1:
        return Shape("union", text, tuple(shape(part.strip()) for part in parts))
    return _bracketed(text)


def _as_interval(text: str) -> Shape | None:
    """Reads one variable between bounds: `2 < x \\le 5` as (2, 5], `x \\ge 3` as [3, \\infty)."""
    match _BOUND.split(text):
        case [low, first, variable, second, high]:
            pass
        case [variable, first, high] if _VARIABLE.fullmatch(variable.strip()):
            low, second = "", first
        case [low, first, variable]:
            high, second = "", first
        case _:
            return None
    rising = first in _RISING
    if not _VARIABLE.fullmatch(variable.strip()) or (second in _RISING) != rising:
        return None
    if not rising:
        low, first, second, high = high, second, first, low
    opener = "[" if "e" in first and low.strip() else "("
    closer = "]" if "e" in second and high.strip() else ")"
    bounds = low.strip() or "-\\infty", high.strip() or "\\infty"
    return Shape(opener + closer, text, tuple(Shape("scalar", bound) for bound in bounds))


def _items(text: str) -> list[str]:
    """Returns the elements of a list; semicolons separate more strongly than commas."""
    for separator in (";", ","):
        items = [item for item in top_level(text, (separator,)) if item.strip()]
        if len(items) > 1:
            return items
    return [text]


def _bracketed(text: str) -> Shape:
    matrix = _MATRIX.fullmatch(text) or _MATRIX.fullmatch(text.strip("()[] "))
    if matrix:
        return _matrix_shape(text, matrix.group(1))
    if text.startswith("\\{") and text.endswith("\\}") and closing(text, 0) == len(text) - 1:
        inside = shape(text[2:-2].strip())
        if "\\mid" in text or "|" in text or not text[2:-2].strip():
            return Shape("scalar", text)
        return Shape("set", text, inside.items if inside.kind == "list" else (inside,))
    if text.startswith(("(", "[", "{")) and closing(text, 0) == len(text) - 1:
        pieces = [piece.strip() for piece in top_level(text[1:-1], (",", ";"))]
        if len(pieces) > 1 and all(pieces):
            # LaTeX prints no bare braces: {1, 2} is a list without brackets.
            kind = "list" if text[0] == "{" else text[0] + text[-1]
            return Shape(kind, text, tuple(map(shape, pieces)))
        if text[0] == "(" and text[-1] == ")" and len(pieces) == 1:
            inner = shape(pieces[0]) if pieces[0] else None
            if inner is not None and inner.kind != "scalar":
                return inner
    return Shape("scalar", text)


def _matrix_shape(text: str, body: str) -> Shape:
    """Reads a single row or column as a tuple, and anything larger as tuples, one for each row."""
    rows = [[cell.strip() for cell in row.split("&")] for row in body.split("\\\\") if row.strip()]
    if len(rows) == 1 or all(len(row) == 1 for row in rows):
        return replace(_tuple([cell for row in rows for cell in row]), text=text)
    return Shape("matrix", text, tuple(map(_tuple, rows)))


def as_matrix(side: Shape) -> Shape | None:
    """Returns a matrix or vector as one, in round or square brackets; None for anything else.

    `[[1, 2], [3, 4]]` is a matrix, `[[1], [2]]` and `[1, 2]` are vectors.
    """
    if side.kind not in ("matrix", "()", "[]"):
        return None
    rows = [shape(r.text[1:-1]) if _ONE_CELL.fullmatch(r.text) else r for r in side.items]
    if all(row.kind == rows[0].kind in ("()", "[]") for row in rows):
        return Shape("matrix", side.text, tuple(replace(row, kind="()") for row in rows))
    return Shape("()", side.text, tuple(rows))


def _tuple(cells: list[str]) -> Shape:
    return Shape("()", f"({', '.join(cells)})", tuple(Shape("scalar", cell) for cell in cells))


def _expand(items: list[str]) -> list[str]:
    r"""Replaces each element that has `\pm` by two: plus, then minus."""
    expanded = []
    for item in items:
        if ("\\pm" in item or "\\mp" in item) and not item.startswith("\\{"):
            for upper, lower in (("+", "-"), ("-", "+")):
                signed = item.replace("\\pm", upper).replace("\\mp", lower)
                expanded.append(re.sub(r"^((?:.*=)?) ?\+ ?", r"\1", signed.strip()))
        else:
            expanded.append(item)
    return expanded
