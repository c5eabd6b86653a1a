"""Algebra on two formulas, by math-verify and sympy. Imported by grading workers only.

May take forever, or all memory: whoever calls it must be killable.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex

from poweropd.grading.quantities import Quantity
from poweropd.grading.rules import Rule

# Both warn of every formula they cannot read and every time limit left to others.
for _name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

# Units and boxes are resolved before: math-verify would take the t of `t / 2 t` for tonnes.
_NORMALISATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
#: What math-verify's parser cannot read, or reads over, as something it can.
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"%", ""),
        (r"(?<=\d)\.(?!\d)", ""),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"\s+!", "!"),
        (r"\\gamma(?![A-Za-z])", "g_{amma}"),  # read as a function of what follows it
        (r"(?<![A-Za-z\\])E(?=_)", r"\\mathcal{E}"),  # an energy, not Euler's number
        (r"\\(?:odot|oplus|ast|star)(?![A-Za-z])", "o"),
        (r"([A-Za-z])(?:''|\^\s*\{?\s*(?:\\prime\s*){2}\}?)", r"\1_{pp}"),
        (r"([A-Za-z])(?:'|\^\s*\{?\s*\\prime\s*\}?)", r"\1_{p}"),
    ]
]
_UNDEFINED = (sympy.nan, sympy.zoo)
_DIGITS = 30
_EQUAL = sympy.Rational(1, 10**14)
#: Values for the symbols of two formulas; where both have values, these must agree.
_POINTS = [0.7390851, 1.3247179, 2.6180339, -0.5671432, 3.3598856, -1.7632228, 5.0, 4.0]
_FEWEST_POINTS = 3


class UnparsableError(ValueError):
    """A text that is no mathematics to math-verify; the message is its parser's."""


@lru_cache(maxsize=2048)
def parse(text: str) -> sympy.Basic | sympy.MatrixBase:
    """A normalised text as a sympy object. Raises UnparsableError for bad syntax only."""
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
    """Whether two parsed answers are equal: by value, at sample points, else by math-verify."""
    if gold.has(*_UNDEFINED) or answer.has(*_UNDEFINED):
        return False
    for decide in (_equal_values, _equal_at_points):
        decided = decide(gold, answer)
        if decided is not None:
            return decided
    return _verify(gold, answer)


def equal_matrices(gold: sympy.Basic, answer: sympy.Basic) -> bool:
    """Equality of matrices and of formulas that give matrices, element by element."""
    first, second = gold.doit(), answer.doit()
    if not isinstance(first, sympy.MatrixBase) or not isinstance(second, sympy.MatrixBase):
        return _verify(first, second)
    pairs = zip(first.flat(), second.flat(), strict=False)
    return first.shape == second.shape and all(equal(a, b) for a, b in pairs)


def equal_solutions(gold: list[str], answer: list[str]) -> bool:
    """Whether two lists of inequalities or sets have the same union."""
    return _verify(_union(gold), _union(answer))


def _union(texts: list[str]) -> sympy.Set:
    parts = [parse(text) for text in texts]
    return sympy.Union(*(part if isinstance(part, sympy.Set) else part.as_set() for part in parts))


def equivalent_relations(gold: str, answer: str) -> bool:
    """Whether two relations, intervals or sets say the same, by math-verify."""
    return _verify(parse(gold), parse(answer))


def equivalent_equations(gold: str, answer: str) -> bool:
    """Whether two equations have the same solutions: one a multiple of the other, else solved."""
    first, second = parse(gold), parse(answer)
    if isinstance(first, sympy.Eq) and isinstance(second, sympy.Eq):
        ratio = _constant_ratio(first.lhs - first.rhs, second.lhs - second.rhs)
        if ratio or _names(first) != _names(second):
            return ratio
    return _verify(first, second)


def _constant_ratio(first: sympy.Expr, second: sympy.Expr) -> bool:
    """Whether one expression is a multiple of the other, judged at sample points."""
    names = _names(first) | _names(second)
    pairs = [(_at(first, values), _at(second, values)) for values in _sample(names)]
    ratios = [a / b for a, b in pairs if a is not None and b]
    return len(ratios) >= _FEWEST_POINTS and all(
        ratio and abs(ratio - ratios[0]) <= 1e-9 * abs(ratio) for ratio in ratios
    )


def _names(formula: sympy.Basic) -> set[str]:
    return {symbol.name for symbol in formula.free_symbols}


def _sample(names: set[str]) -> list[dict[str, float]]:
    """Values for the symbols, differing between symbols and from point to point."""
    return [
        {
            name: _POINTS[(start + 3 * place) % len(_POINTS)]
            for place, name in enumerate(sorted(names))
        }
        for start in range(len(_POINTS))
    ]


def _verify(gold: sympy.Basic, answer: sympy.Basic) -> bool:
    return verify(
        gold,
        answer,
        float_rounding=9,
        strict=True,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )


def value(expression: sympy.Basic) -> sympy.Expr | None:
    """The number an expression without symbols stands for (exact where rational), else None."""
    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    done = expression.doit()
    if done.is_Rational:
        return done
    number = sympy.N(done, _DIGITS)
    return number if number.is_number and number.is_finite is not False else None


def close(gold: Quantity, answer: sympy.Expr, rule: Rule) -> bool:
    """Whether an expression's value lies within what the rule forgives of a numeric gold."""
    difference = abs(rational(gold.value) - answer)
    allowed = rule.absolute_tolerance
    if gold.decimal:
        allowed = max(allowed, rule.relative_tolerance * abs(float(gold.value)))
    return bool(difference <= allowed)


def _equal_values(gold: sympy.Basic, answer: sympy.Basic) -> bool | None:
    gold_value, answer_value = value(gold), value(answer)
    if gold_value is None or answer_value is None:
        return None
    return same_number(gold_value, answer_value)


def rational(number: Fraction) -> sympy.Rational:
    """An exact number as sympy's."""
    return sympy.Rational(number.numerator, number.denominator)


def fraction(number: sympy.Expr) -> Fraction:
    """A real value as a fraction, to the digits it was evaluated to."""
    exact = sympy.Rational(number)
    return Fraction(int(exact.p), int(exact.q))


def same_number(first: sympy.Expr, second: sympy.Expr) -> bool:
    """Equality of two values: exact between rationals, else to 14 digits."""
    if first.is_Rational and second.is_Rational:
        return first == second
    scale = max(abs(first), abs(second), sympy.Rational(1, 10**12))
    return bool(abs(first - second) <= _EQUAL * scale)


def _equal_at_points(gold: sympy.Basic, answer: sympy.Basic) -> bool | None:
    """Equality of two formulas at real points; None where too few points give values to both."""
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return None
    names = _names(gold) | _names(answer)
    if not names or gold.atoms(sympy.core.function.AppliedUndef, sympy.Derivative):
        return None
    if any(isinstance(side, sympy.Symbol) and len(side.name) > 1 for side in (gold, answer)):
        return None  # a word, perhaps, against the product of its letters
    if gold.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit):
        return None
    agreements = 0
    for values in _sample(names):
        pair = _at(gold, values), _at(answer, values)
        if pair[0] is None or pair[1] is None:
            continue
        scale = max(abs(pair[0]), abs(pair[1]), 1e-9)
        if abs(pair[0] - pair[1]) > 1e-9 * scale:
            # Only a clear difference at real points decides; floors and parities live on integers.
            return None if gold.has(sympy.floor, sympy.ceiling, sympy.factorial) else False
        agreements += 1
    return True if agreements >= _FEWEST_POINTS else None


def _at(expression: sympy.Expr, values: dict[str, float]) -> complex | None:
    replaced = expression.subs({s: values[s.name] for s in expression.free_symbols})
    number = sympy.N(replaced, 20)
    if not number.is_number or number.has(sympy.nan, sympy.zoo, sympy.oo):
        return None
    return complex(number)


def has_letters(text: str) -> bool:
    """Whether a formula has symbols of its own, apart from commands."""
    return re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)) is not None
