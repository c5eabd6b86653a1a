"""Decides what needs no algebra, in microseconds: equal texts, words, choices, numerals, numbers.

It is safe in any process: nothing here can hang or crash, and nothing heavy is imported.
"""

import re
from collections.abc import Hashable
from dataclasses import replace
from fractions import Fraction

from poweropd.grading import rules, shapes
from poweropd.grading.notation import based, choice, key, normalise, words
from poweropd.grading.quantities import Quantity, quantity, without_unit
from poweropd.grading.rules import Rule, Verdict
from poweropd.grading.shapes import assignment

#: A decimal of so many significant digits, right to its last place, counts as the exact number.
APPROXIMATION_DIGITS = 5
#: Longer answers hold no plain number or word, and go to a worker that can be killed.
LONGEST = 400
#: Three digits after one comma are thousands, unless none or too many digits stand before it.
_DECIMAL_COMMA = re.compile(r"[+-]?(?:\d+,\d{1,2}|(?:0+|\d{4,}),\d{3})")


def verdict_of(correct: bool) -> Verdict:
    """Returns the verdict on an answer that was understood."""
    return Verdict(rules.CORRECT if correct else rules.WRONG)


def quick(gold: str, answer: str, rule: Rule) -> Verdict | None:
    """Decides identical texts, words, choices and plain numbers; None if algebra is needed."""
    if len(answer) > LONGEST:
        return Verdict(rules.CORRECT) if gold.strip() == answer.strip() else None
    if key(gold) == key(answer) != "":
        return Verdict(rules.CORRECT)
    gold, answer = normalise(gold), normalise(answer)
    if not answer:
        return Verdict(rules.NO_ANSWER)
    if not gold:
        return Verdict(rules.UNPARSED_GOLD, "the gold answer is empty")
    return same_text(gold, answer, rule)


def same_text(gold: str, answer: str, rule: Rule) -> Verdict | None:
    """Does the work of `quick` on normalised texts, one element against one."""
    if key(gold) == key(answer):
        return Verdict(rules.CORRECT)
    verdict = (
        _same_reading(choice(gold), choice(answer))
        or _same_base(gold, answer)
        or _same_reading(words(gold), words(answer))
    )
    if verdict is not None:
        return verdict
    if any(
        _DECIMAL_COMMA.fullmatch(one) and one.replace(",", ".") == other
        for one, other in ((gold, answer), (answer, gold))
    ):
        return Verdict(rules.CORRECT)
    gold_number, answer_number = number(gold), number(answer)
    if gold_number is None or answer_number is None:
        return None
    if differing_variables(assignment(gold)[0], assignment(answer)[0]):
        return Verdict(rules.WRONG)
    both_lists = shapes.grouped(gold) is not None and shapes.grouped(answer) is not None
    if both_lists and rule.unordered and sorted(gold.split(",")) == sorted(answer.split(",")):
        return Verdict(rules.CORRECT)
    return verdict_of(same_quantity(gold_number, answer_number, rule))


def _same_reading(gold: Hashable | None, answer: Hashable | None) -> Verdict | None:
    """Compares what two texts were read as; returns None if either could not be read that way."""
    return None if gold is None or answer is None else verdict_of(gold == answer)


def _same_base(gold: str, answer: str) -> Verdict | None:
    """Compares numerals with a base, of which only the digits count if one side names no base."""
    gold_based, answer_based = based(gold), based(answer)
    if gold_based and answer_based:
        return verdict_of(gold_based == answer_based)
    known, other = (gold_based, answer) if gold_based else (answer_based, gold)
    return verdict_of(known[0] == other.replace(" ", "").upper()) if known else None


def differing_variables(gold: str | None, answer: str | None) -> bool:
    """Returns whether two names are two different variables: x = 1 is not y = 1."""
    return gold != answer and len(gold or "") == len(answer or "") == 1


def number(text: str) -> Quantity | None:
    """Returns the number that a text gives, perhaps with a name before it and a unit after it."""
    return quantity(text) or quantity(without_unit(assignment(text)[1]))


def same_quantity(gold: Quantity, answer: Quantity, rule: Rule) -> bool:
    """Returns whether two numbers are equal in one of the readings that percent signs allow."""
    readings = [(gold, answer)]
    if gold.percent and not answer.percent:
        readings.append((replace(gold, value=gold.value / 100), answer))
    if answer.percent and not gold.percent:
        as_fraction = (gold, replace(answer, value=answer.value / 100))
        # "0.5%" is not the probability 0.5, but "50%" may answer "what percent" with 50.
        readings = [*readings, as_fraction] if abs(gold.value) >= 1 else [as_fraction]
    return any(_about_equal(*pair, rule) for pair in readings)


def _about_equal(gold: Quantity, answer: Quantity, rule: Rule) -> bool:
    return abs(gold.value - answer.value) <= tolerance(gold, rule) or any(
        exact.places is None and rounds_to(exact.value, rounded)
        for exact, rounded in ((gold, answer), (answer, gold))
    )


def tolerance(gold: Quantity, rule: Rule) -> float:
    """Returns the difference from a numeric gold that a rule forgives."""
    relative = rule.relative_tolerance * float(abs(gold.value)) if gold.decimal else 0.0
    return max(rule.absolute_tolerance, relative)


def rounds_to(exact: Fraction, decimal: Quantity) -> bool:
    """Returns whether a decimal of enough digits is a value rounded or cut at its last place."""
    if decimal.places is None or decimal.digits < APPROXIMATION_DIGITS:
        return False
    ulps = (decimal.value - exact) * 10**decimal.places
    cut = abs(decimal.value) < abs(exact)
    return abs(ulps) <= Fraction(1, 2) or (cut and abs(ulps) < 1)


def identical(gold: str, text: str) -> bool:
    """Returns whether a text is the gold itself, which no search for an answer might find."""
    return len(text) <= 4 * len(gold) + 40 and key(gold) == key(text)
