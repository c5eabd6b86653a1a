"""Reads numbers exactly, and notes how they are written: percent, decimals, significant digits."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from poweropd.grading.brackets import closing


@dataclass(frozen=True)
class Quantity:
    """An exact number and how it was written.

    places: digits after the decimal point, or None if it is no plain decimal.
    decimal: written with a point or an exponent, as measured values are.
    """

    value: Fraction
    percent: bool = False
    decimal: bool = False
    places: int | None = None
    digits: int = 0


_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d{1,400})"
_REAL = rf"(?:{_INTEGER}(?:\.\d{{0,400}})?|\.\d{{1,400}})"
_PLAIN = re.compile(rf"([+-]? ?)({_REAL})(?:[eE]([+-]?\d{{1,3}}))?")
_SCIENTIFIC = re.compile(
    rf"([+-]? ?)(?:({_REAL}) ?(?:\\times|\\cdot|\*|[xX]) ?)?"
    r"10 ?\^ ?(?:\{ ?([+-]?\d{1,3}) ?\}|([+-]?\d{1,3}))"
)
_FRACTION = re.compile(
    rf"([+-]? ?)(?:\\frac\{{ ?([+-]? ?{_REAL}) ?\}} ?\{{ ?([+-]? ?{_REAL}) ?\}}"
    rf"|\(? ?([+-]? ?{_REAL}) ?\)? ?/ ?\(? ?({_REAL}) ?\)?)"
)
_MIXED = re.compile(
    r"([+-]? ?)(\d{1,9})(?: ?\\frac\{(\d{1,9})\} ?\{(\d{1,9})\}| (\d{1,9})/(\d{1,9}))"
)
_REPEATING = re.compile(r"(\d{1,9})\.(\d{0,9})\\overline ?\{(\d{1,9})\}")
_RATIO = re.compile(r"(\d{1,9}) ?: ?(\d{1,9})")


def _real(text: str, sign: str = "") -> Fraction:
    value = Fraction(text.replace(",", "").replace(" ", ""))
    return -value if sign.strip() == "-" else value


def _plain(match: re.Match[str]) -> Quantity:
    sign, digits, exponent = match.groups()
    value = _real(digits, sign) * Fraction(10) ** int(exponent or 0)
    places = len(digits.split(".")[1]) if "." in digits and exponent is None else None
    significant = len(re.sub(r"\D", "", digits).lstrip("0"))
    return Quantity(value, False, "." in digits or exponent is not None, places, significant)


def _scientific(match: re.Match[str]) -> Quantity:
    sign, digits, braced, bare = match.groups()
    value = _real(digits or "1", sign) * Fraction(10) ** int(braced or bare)
    return Quantity(value, decimal=digits is not None)


def _fraction(match: re.Match[str]) -> Quantity:
    sign, top, bottom, slash_top, slash_bottom = match.groups()
    return Quantity(_real(top or slash_top, sign) / _real(bottom or slash_bottom))


def _mixed(match: re.Match[str]) -> Quantity:
    sign, whole, *parts = match.groups()
    top, bottom = (int(part) for part in parts if part is not None)
    return Quantity(_real("1", sign) * (int(whole) + Fraction(top, bottom)))


def _repeating(match: re.Match[str]) -> Quantity:
    """Reads 8.1\\overline{3}, whose block repeats without end."""
    whole, fixed, block = match.groups()
    nines = 10 ** len(block) - 1
    shift = 10 ** len(fixed)
    return Quantity(int(whole) + Fraction(int(fixed or 0) * nines + int(block), shift * nines))


def _ratio(match: re.Match[str]) -> Quantity:
    return Quantity(Fraction(*map(int, match.groups())))


_READERS = [
    (_PLAIN, _plain), (_SCIENTIFIC, _scientific), (_MIXED, _mixed), (_FRACTION, _fraction),
    (_RATIO, _ratio), (_REPEATING, _repeating),
]  # fmt: skip


def quantity(text: str) -> Quantity | None:
    """Returns the exact number that a normalised text writes out; None if it holds more."""
    percent = text.endswith("%")
    text = text.rstrip("% ").strip()
    if text.startswith("(") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    for pattern, read in _READERS:
        match = pattern.fullmatch(text)
        if match:
            try:
                return replace(read(match), percent=percent)
            except ZeroDivisionError:
                return None
    return None


# Atomic and possessive parts leave one way to read a text: an exponential search has many.
_MEASURE = re.compile(
    rf"(?:(?:approximately|approx\.?|about|around|exactly|nearly|almost) )?"
    rf"([+-]? ?(?:{_REAL}(?:[eE][+-]?\d{{1,3}})?"
    r"|\\frac\{\d+\}\{\d+\}|\d+ ?\\frac\{\d+\}\{\d+\}|\d+ \d+/\d+|\d+/\d+"
    rf"|{_REAL} ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?\{{?-?\d+\}}?) ?%?)"
    r"(?:(?> ?[-/]? ?\(?)(?![xyzabn]{2}\b)[A-Za-z][A-Za-z.'/-]++\)?(?: ?\^ ?\{?-?\d\}?)?"
    r"| [mgshLJNKWV](?![A-Za-z])(?: ?\^ ?\{?-?\d\}?)?"
    r"(?: ?/ ?[smhL](?![A-Za-z])(?: ?\^ ?\{?-?\d\}?)?)?)+"
)


def without_unit(text: str) -> str:
    """Removes the unit words after a normalised number; returns other text as it is."""
    match = _MEASURE.fullmatch(text)
    return match.group(1).strip() if match else text
