"""Compares an answer with the gold answer: structure first, algebra on the parts.

Algebra may hang or crash, so a comparison runs in workers that can be killed.
"""

import re
from fractions import Fraction

import sympy

from poweropd.grading import rules, symbolic
from poweropd.grading.brackets import top_level
from poweropd.grading.exact import (
    differing_variables,
    number,
    rounds_to,
    same_text,
    tolerance,
    verdict_of,
)
from poweropd.grading.notation import key, normalise, words
from poweropd.grading.quantities import quantity, without_unit
from poweropd.grading.rules import Rule, Verdict
from poweropd.grading.shapes import Shape, as_matrix, assignment, grouped, shape

_APPROXIMATES = re.compile(r"\\approx(?![A-Za-z])")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|ne)(?![A-Za-z])")
_FUNCTION = re.compile(r"[A-Za-z]\(([A-Za-z])\)")
_INTERVALS = {"()", "[]", "(]", "[)"}
_UNORDERED = {"list", "set", "union"}
_SET = re.compile(r"\\(?:cup|cap|setminus|mathbb|infty|emptyset|varnothing)(?![A-Za-z])|[\[(].*,")


def compare(gold: str, answer: str, rule: Rule) -> Verdict:
    """Decides a pair that `exact.quick` leaves open.

    Bad syntax is a verdict of its own; other errors of the algebra propagate.
    """
    gold, answer = normalise(gold), normalise(answer)
    if not answer:
        return Verdict(rules.NO_ANSWER)
    try:
        return verdict_of(_same(shape(gold), shape(answer), rule))
    except symbolic.UnparsableError as error:
        detail = str(error)
    try:
        symbolic.parse(gold)
    except symbolic.UnparsableError as error:
        if shape(gold).kind == "scalar" and words(gold) is None:
            return Verdict(rules.UNPARSED_GOLD, str(error))
    return Verdict(rules.UNPARSED_ANSWER, detail)


def _same(gold: Shape, answer: Shape, rule: Rule) -> bool:
    if key(gold.text) == key(answer.text):
        return True
    if {gold.kind, answer.kind} == {"scalar", "list"}:
        gold, answer = grouped(gold.text) or gold, grouped(answer.text) or answer
    wanted, given = as_matrix(gold), as_matrix(answer)
    if wanted and given and ("\\begin" in gold.text + answer.text or wanted.kind == "matrix"):
        return _same_items(wanted, given, rule) if wanted.kind == given.kind else False
    kinds = {gold.kind, answer.kind}
    if kinds == {"scalar"}:
        return _same_scalar(gold.text, answer.text, rule)
    if gold.items and answer.items and _kinds_match(gold, answer):
        same = _same_items(gold, answer, rule)
        if same or "union" not in kinds:
            return same
    elif kinds == {"scalar", "set"} and len(gold.items or answer.items) == 1:
        wanted, given = (side.items[0] if side.items else side for side in (gold, answer))
        return _same(wanted, given, rule)
    if "\\begin" in gold.text and "\\begin" in answer.text:
        return symbolic.equal_matrices(symbolic.parse(gold.text), symbolic.parse(answer.text))
    if "list" in kinds and (first := _alternatives(gold)) and (second := _alternatives(answer)):
        return symbolic.equal_solutions(first, second)
    return _same_solutions(gold.text, answer.text)


def _kinds_match(gold: Shape, answer: Shape) -> bool:
    """Returns whether brackets are equal; a list may also be written as a set or a tuple."""
    kinds = {gold.kind, answer.kind}
    if kinds == {"list", "union"}:  # x < 2 or x > 3
        return all(item.kind in _INTERVALS for item in (*gold.items, *answer.items))
    return len(kinds) == 1 or ("list" in kinds and kinds <= {"list", "set", "()"})


def _same_items(gold: Shape, answer: Shape, rule: Rule) -> bool:
    kinds = {gold.kind, answer.kind}
    unordered = kinds <= _UNORDERED and (rule.unordered or kinds != {"list"})
    left = list(answer.items)
    if unordered and len(left) > len(gold.items):
        left = list({key(item.text): item for item in left}.values())  # said twice is said once
    if len(gold.items) != len(left):
        return False
    if not unordered:
        return all(_same(g, a, rule) for g, a in zip(gold.items, left, strict=True))
    for wanted in gold.items:
        # Equal texts come first, because algebra on every pair would be slow.
        left.sort(key=lambda item: key(item.text) != key(wanted.text))
        match = next((item for item in left if _same(wanted, item, rule)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_solutions(gold: str, answer: str) -> bool:
    """Compares intervals, inequalities and number sets in any notation: 0 < x < 1 and (0, 1)."""
    if not all(_INEQUALITY.search(text) or _SET.search(text) for text in (gold, answer)):
        return False
    inequalities = _INEQUALITY.search(gold) or _INEQUALITY.search(answer)
    unions = any("\\c" in text or "\\setminus" in text for text in (gold, answer))
    return bool(inequalities or unions) and symbolic.equivalent_relations(
        _membership(gold), _membership(answer)
    )


def _alternatives(side: Shape) -> list[str] | None:
    """Returns listed inequalities, x < 2 or x > 3, or the one set; None for any other text."""
    if side.kind != "list":
        return [_membership(side.text)] if _SET.search(side.text) else None
    texts = [item.text for item in side.items]
    return texts if all(map(_INEQUALITY.search, texts)) else None


def _membership(text: str) -> str:
    name, value = assignment(text)
    return value if name is not None and not _INEQUALITY.search(text) else text


def _same_scalar(gold: str, answer: str, rule: Rule) -> bool:
    if _INEQUALITY.search(gold) or _INEQUALITY.search(answer):
        return _same_solutions(gold, answer)
    gold_name, gold_parts = _equation(gold)
    answer_name, answer_parts = _equation(answer)
    gold_relation = gold_name is None and len(gold_parts) > 1
    answer_relation = answer_name is None and len(answer_parts) > 1
    if gold_relation or (answer_relation and gold_name is not None):
        answer_is_equation = len(answer_parts) > 1 or answer_name is not None
        return answer_is_equation and symbolic.equivalent_equations(gold, answer)
    if differing_variables(gold_name, answer_name):
        return False
    # `a = b = c` is a calculation that ends in its answer, or an equation in unknowns: `x^2 = 3`
    # does not answer 3, because its left side has letters and is not the value of the gold.
    first = answer_parts[0]
    if answer_relation and symbolic.has_letters(first) and not _same_value(gold, first, rule):
        return False
    given_value = _renamed(gold_name, answer_name, answer_parts[-1])
    return any(
        _same_value(wanted, given, rule)
        for wanted in _approximations(gold_parts[-1])
        for given in _approximations(given_value)
    )


def _renamed(gold_name: str | None, answer_name: str | None, value: str) -> str:
    """Writes the value of f(x) = 2x in the gold's variable, if the gold writes f(n) = 2n."""
    gold_function = _FUNCTION.fullmatch(gold_name or "")
    answer_function = _FUNCTION.fullmatch(answer_name or "")
    if not gold_function or not answer_function:
        return value
    variable = re.escape(answer_function.group(1))
    return re.sub(rf"(?<![A-Za-z\\]){variable}(?![A-Za-z])", gold_function.group(1), value)


def _equation(text: str) -> tuple[str | None, list[str]]:
    name, value = assignment(text)
    return name, [part.strip() for part in top_level(value, ("=",)) if part.strip()] or [value]


def _approximations(text: str) -> list[str]:
    return [part.strip() for part in _APPROXIMATES.split(text) if part.strip()] or [text]


def _same_value(gold: str, answer: str, rule: Rule) -> bool:
    verdict = same_text(gold, answer, rule)
    if verdict is not None:
        return verdict.reason == rules.CORRECT
    if words(gold) is not None:
        return False
    gold_number = number(gold)
    if gold_number is not None and not symbolic.has_letters(gold):
        answer = without_unit(answer)
    given = symbolic.parse(answer)
    if gold_number is None:
        wanted = symbolic.parse(gold)
        if symbolic.equal(wanted, given):
            return True
        exact, decimal = symbolic.value(wanted), quantity(answer)
    else:
        wanted = sympy.Rational(gold_number.value)
        exact, decimal = symbolic.value(given), gold_number
        if exact is not None and symbolic.same_number(wanted, exact):
            return True
        if exact is not None and abs(wanted - exact) <= tolerance(gold_number, rule):
            return True
    if exact is None or decimal is None or exact.is_real is False:
        return False
    return rounds_to(Fraction(sympy.Rational(exact)), decimal)
