"""Algebra on two formulas, by math-verify and sympy; only grading workers import it.

It may take forever, or all memory, so the process that calls it must be killable.
"""

import logging
import re
from collections.abc import Iterator
from functools import lru_cache, partial

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex

# Both warn of every formula that they cannot read and of every time limit that others keep.
for _name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

# Units and boxes are resolved before this: math-verify would read the t of `t / 2 t` as tonnes.
_NORMALISATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
#: Replaces what math-verify's parser cannot read, or skips, by something that it can read.
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"%", ""),
        (r"(?<=\d)\.(?!\d)", ""),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"\s+!", "!"),
        (r"\\gamma(?![A-Za-z])", "g_{amma}"),  # read as a function of what follows it
        (r"\\(D|T|L|X|P|S|O)(elta|heta|ambda|i|igma|hi|si|mega)(?![A-Za-z])", r"\1_{\2}"),
        (r"(?<![A-Za-z\\])E(?=_)", r"\\mathcal{E}"),  # an energy, not Euler's number
        (r"\\(?:odot|oplus|ast|star)(?![A-Za-z])", "o"),
        (r"([A-Za-z])(?:''|\^\s*\{?\s*(?:\\prime\s*){2}\}?)", r"\1_{pp}"),
        (r"([A-Za-z])(?:'|\^\s*\{?\s*\\prime\s*\}?)", r"\1_{p}"),
    ]
]
_UNDEFINED = (sympy.nan, sympy.zoo)
_DIGITS = 30
_EQUAL = sympy.Rational(1, 10**14)
#: Values for the symbols of two formulas; equal formulas have equal values at each point.
_POINTS = [0.7390851, 1.3247179, 2.6180339, -0.5671432, 3.3598856, -1.7632228, 5.0, 4.0]
_FEWEST_POINTS = 3
_verify = partial(
    verify,
    float_rounding=9,
    strict=True,
    allow_set_relation_comp=True,
    timeout_seconds=None,
    raise_on_error=True,
)


class UnparsableError(ValueError):
    """A text that is no mathematics to math-verify; the message is its parser's."""


@lru_cache(maxsize=2048)
def parse(text: str) -> sympy.Basic | sympy.MatrixBase:
    """Returns a normalised text as a sympy object. Raises UnparsableError for bad syntax only."""
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    latex = normalize_latex(text, _NORMALISATION)
    try:
        return latex2sympy(
            latex,
            is_real=not should_treat_as_complex(latex),
            convert_degrees=False,
            normalization_config=None,
        )
    except Exception as error:
        # latex2sympy raises bare Exception for bad syntax; any subclass is a failure of its own.
        if type(error) is not Exception:
            raise
        first_line = str(error).strip().split("\n", 1)[0]
        raise UnparsableError(f"expected mathematics, got {text[:80]!r}: {first_line}") from None


def equal(gold: sympy.Basic, answer: sympy.Basic) -> bool:
    """Returns whether two parsed answers are equal by value, at points, or else to math-verify."""
    if gold.has(*_UNDEFINED) or answer.has(*_UNDEFINED):
        return False
    gold_value, answer_value = value(gold), value(answer)
    if gold_value is not None and answer_value is not None:
        return same_number(gold_value, answer_value)
    decided = _equal_at_points(gold, answer)
    return _verify(gold, answer) if decided is None else decided


def equal_matrices(gold: sympy.Basic, answer: sympy.Basic) -> bool:
    """Compares matrices, and formulas that give matrices, element by element."""
    first, second = gold.doit(), answer.doit()
    if not isinstance(first, sympy.MatrixBase) or not isinstance(second, sympy.MatrixBase):
        return _verify(first, second)
    pairs = zip(first.flat(), second.flat(), strict=False)
    return first.shape == second.shape and all(equal(a, b) for a, b in pairs)


def equal_solutions(gold: list[str], answer: list[str]) -> bool:
    """Returns whether two lists of inequalities or sets have the same union."""
    return _verify(_union(gold), _union(answer))


def _union(texts: list[str]) -> sympy.Set:
    parts = [parse(text) for text in texts]
    return sympy.Union(*(part if isinstance(part, sympy.Set) else part.as_set() for part in parts))


def equivalent_relations(gold: str, answer: str) -> bool:
    """Returns whether two relations, intervals or sets say the same, by math-verify."""
    return _verify(parse(gold), parse(answer))


def equivalent_equations(gold: str, answer: str) -> bool:
    """Returns whether one equation is a multiple of the other, or else has the same solutions."""
    first, second = parse(gold), parse(answer)
    if isinstance(first, sympy.Eq) and isinstance(second, sympy.Eq):
        ratio = _constant_ratio(first.lhs - first.rhs, second.lhs - second.rhs)
        if ratio or _symbol_names(first) != _symbol_names(second):
            return ratio
    return _verify(first, second)


def _constant_ratio(first: sympy.Expr, second: sympy.Expr) -> bool:
    """Returns whether one expression is a multiple of the other, judged at sample points."""
    ratios = [a / b for a, b in _values_at_points(first, second) if b]
    return len(ratios) >= _FEWEST_POINTS and all(
        ratio and abs(ratio - ratios[0]) <= 1e-9 * abs(ratio) for ratio in ratios
    )


def _symbol_names(formula: sympy.Basic) -> set[str]:
    return {symbol.name for symbol in formula.free_symbols}


def value(expression: sympy.Basic) -> sympy.Expr | None:
    """Returns the number of an expression without symbols, exact if rational; None for others."""
    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    done = expression.doit()
    if done.is_Rational:
        return done
    number = sympy.N(done, _DIGITS)
    return number if number.is_number and number.is_finite is not False else None


def same_number(first: sympy.Expr, second: sympy.Expr) -> bool:
    """Returns whether two values are equal: exactly if both are rational, else to 14 digits."""
    if first.is_Rational and second.is_Rational:
        return first == second
    scale = max(abs(first), abs(second), sympy.Rational(1, 10**12))
    return bool(abs(first - second) <= _EQUAL * scale)


def _equal_at_points(gold: sympy.Basic, answer: sympy.Basic) -> bool | None:
    """Compares two formulas at real points; None if too few points give values to both."""
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return None
    no_symbols = not gold.free_symbols and not answer.free_symbols
    if no_symbols or gold.atoms(sympy.core.function.AppliedUndef, sympy.Derivative):
        return None
    if any(isinstance(side, sympy.Symbol) and len(side.name) > 1 for side in (gold, answer)):
        return None  # It may be a word, to be compared with the product of its letters.
    if gold.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit):
        return None
    agreements = 0
    for first, second in _values_at_points(gold, answer):
        if abs(first - second) > 1e-9 * max(abs(first), abs(second), 1e-9):
            # Only a clear difference at real points decides; floors and parities live on integers.
            return None if gold.has(sympy.floor, sympy.ceiling, sympy.factorial) else False
        agreements += 1
    return True if agreements >= _FEWEST_POINTS else None


def _values_at_points(first: sympy.Expr, second: sympy.Expr) -> Iterator[tuple[complex, complex]]:
    """Yields the values of two formulas at each sample point that gives a value to both.

    The values of the symbols differ between symbols and from point to point.
    """
    names = sorted(_symbol_names(first) | _symbol_names(second))
    for start in range(len(_POINTS)):
        point = {name: _POINTS[(start + 3 * i) % len(_POINTS)] for i, name in enumerate(names)}
        left, right = _at(first, point), _at(second, point)
        if left is not None and right is not None:
            yield left, right


def _at(expression: sympy.Expr, values: dict[str, float]) -> complex | None:
    replaced = expression.subs({s: values[s.name] for s in expression.free_symbols})
    number = sympy.N(replaced, 20)
    if not number.is_number or number.has(sympy.nan, sympy.zoo, sympy.oo):
        return None
    return complex(number)


def has_letters(text: str) -> bool:
    """Returns whether a formula has symbols of its own, apart from commands."""
    return re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)) is not None
