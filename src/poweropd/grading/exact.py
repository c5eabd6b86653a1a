"""Decides what needs no algebra, in microseconds: equal texts, words, choices, numerals, numbers.

Safe in any process: nothing here can hang or crash, and nothing heavy is imported.
"""

import re
from fractions import Fraction

from poweropd.grading import rules, shapes
from poweropd.grading.notation import based, choice, key, normalise, words
from poweropd.grading.quantities import Quantity, quantity, without_unit
from poweropd.grading.rules import Rule, Verdict
from poweropd.grading.shapes import assignment

#: A decimal of so many significant digits, right to its last place, counts as the exact number.
APPROXIMATION_DIGITS = 5
#: Longer answers hold no plain number or word, and go to a worker that can be killed.
_LONGEST = 400
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d{1,3}")


def verdict_of(correct: bool) -> Verdict:
    return Verdict(rules.CORRECT if correct else rules.WRONG)


def is_several(gold: str) -> bool:
    """Whether a gold answer lists several answers, which may then come in several boxes."""
    return shapes.is_several(normalise(gold))


def quick(gold: str, answer: str, rule: Rule) -> Verdict | None:
    """Decides identical texts, words, choices and plain numbers; None where algebra is needed."""
    if key(gold) == key(answer) != "":
        return Verdict(rules.CORRECT)
    gold, answer = normalise(gold), normalise(answer)
    if not answer:
        return Verdict(rules.NO_ANSWER)
    if not gold:
        return Verdict(rules.UNPARSED_GOLD, "the gold answer is empty")
    if len(answer) > _LONGEST:
        return None
    return same_text(gold, answer, rule)


def same_text(gold: str, answer: str, rule: Rule) -> Verdict | None:
    """`quick` on normalised texts, one element against one."""
    if key(gold) == key(answer):
        return Verdict(rules.CORRECT)
    for decide in (_same_choice, _same_base, _same_words):
        verdict = decide(gold, answer)
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
    gold_name, answer_name = assignment(gold)[0], assignment(answer)[0]
    if gold_name and answer_name and differing_variables(gold_name, answer_name):
        return Verdict(rules.WRONG)
    gold_list, answer_list = shapes.grouped(gold), shapes.grouped(answer)
    both_lists = gold_list is not None and answer_list is not None and rule.unordered
    if both_lists and sorted(gold.split(",")) == sorted(answer.split(",")):
        return Verdict(rules.CORRECT)
    return verdict_of(same_quantity(gold_number, answer_number, rule))


def _same_choice(gold: str, answer: str) -> Verdict | None:
    gold_choice, answer_choice = choice(gold), choice(answer)
    if gold_choice is None or answer_choice is None:
        return None
    return verdict_of(gold_choice == answer_choice)


def _same_base(gold: str, answer: str) -> Verdict | None:
    """Numerals with a base; where only one side names it, the problem has, and digits decide."""
    gold_based, answer_based = based(gold), based(answer)
    if gold_based is None and answer_based is None:
        return None
    if gold_based and answer_based:
        return verdict_of(gold_based == answer_based)
    digits = (gold_based or answer_based or ("", 0))[0]
    other = answer if gold_based else gold
    return verdict_of(digits == other.replace(" ", "").upper())


def _same_words(gold: str, answer: str) -> Verdict | None:
    gold_words, answer_words = words(gold), words(answer)
    if gold_words is not None and answer_words is not None:
        return verdict_of(gold_words == answer_words)
    return None


def differing_variables(gold: str, answer: str) -> bool:
    """Whether two names are two different variables: x = 1 is not y = 1."""
    return gold != answer and len(gold) == 1 and len(answer) == 1


def number(text: str) -> Quantity | None:
    """The number a text gives, perhaps with a name before it and a unit after it."""
    found = quantity(text)
    if found is None:
        _, value = assignment(text)
        found = quantity(without_unit(value))
    return found


def same_quantity(gold: Quantity, answer: Quantity, rule: Rule) -> bool:
    """Equality of two numbers under a rule, in every reading their percent signs allow."""
    readings = [(gold.value, answer.value)]
    if gold.percent and not answer.percent:
        readings.append((gold.value / 100, answer.value))
    if answer.percent and not gold.percent:
        as_fraction = (gold.value, answer.value / 100)
        # "0.5%" is not the probability 0.5, while "50%" may well answer "what percent" with 50.
        readings = [*readings, as_fraction] if abs(gold.value) >= 1 else [as_fraction]
    return any(_close(gold, answer, *pair, rule) for pair in readings)


def _close(gold: Quantity, answer: Quantity, wanted: Fraction, given: Fraction, rule: Rule) -> bool:
    difference = abs(wanted - given)
    allowed = rule.absolute_tolerance
    if gold.decimal:
        allowed = max(allowed, rule.relative_tolerance * float(abs(wanted)))
    return difference <= allowed or any(
        exact.places is None and rounds_to(value, rounded)
        for exact, value, rounded in ((gold, wanted, answer), (answer, given, gold))
    )


def rounds_to(exact: Fraction, decimal: Quantity) -> bool:
    """Whether a decimal of enough digits is an exact value, rounded or cut at its last place."""
    if decimal.places is None or decimal.digits < APPROXIMATION_DIGITS:
        return False
    ulps = (decimal.value - exact) * 10**decimal.places
    cut = abs(decimal.value) < abs(exact)
    return abs(ulps) <= Fraction(1, 2) or (cut and abs(ulps) < 1)


def identical(gold: str, text: str) -> bool:
    """Whether a text is the gold itself: for golds that no search for an answer would find."""
    return len(text) <= 4 * len(gold) + 40 and key(gold) == key(text)
