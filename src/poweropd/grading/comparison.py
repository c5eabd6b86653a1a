"""Compares an answer with the gold answer: structure first, algebra on the parts.

May hang or crash, since algebra may: it runs in workers that can be killed.
"""

import re

import sympy

from poweropd.grading import rules, symbolic
from poweropd.grading.brackets import top_level
from poweropd.grading.exact import (
    differing_variables,
    number,
    quick,
    rounds_to,
    same_text,
    verdict_of,
)
from poweropd.grading.notation import key, normalise, words
from poweropd.grading.quantities import Quantity, quantity, without_unit
from poweropd.grading.rules import Rule, Verdict
from poweropd.grading.shapes import Shape, assignment, grouped, shape

_APPROXIMATES = re.compile(r"\\approx(?![A-Za-z])")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|ne)(?![A-Za-z])")
_FUNCTION = re.compile(r"[A-Za-z]\(([A-Za-z])\)")
_INTERVALS = {"()", "[]", "(]", "[)"}
_UNORDERED = {"list", "set", "union"}
_SET = re.compile(r"\\(?:cup|cap|setminus|mathbb|infty|emptyset|varnothing)(?![A-Za-z])|[\[(].*,")


def compare(gold: str, answer: str, rule: Rule) -> Verdict:
    """Decides any pair. Errors of the algebra propagate; bad syntax is a verdict of its own."""
    verdict = quick(gold, answer, rule)
    if verdict is not None:
        return verdict
    gold, answer = normalise(gold), normalise(answer)
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
    if gold.kind == answer.kind == "scalar":
        return _same_scalar(gold.text, answer.text, rule)
    if gold.items and answer.items and _kinds_match(gold, answer):
        same = _same_items(gold, answer, rule)
        if same or "union" not in (gold.kind, answer.kind):
            return same
    elif _single(gold) is not None and answer.kind == "scalar":
        return _same(_single(gold) or gold, answer, rule)
    elif _single(answer) is not None and gold.kind == "scalar":
        return _same(gold, _single(answer) or answer, rule)
    if "\\begin" in gold.text and "\\begin" in answer.text:
        return symbolic.equal_matrices(symbolic.parse(gold.text), symbolic.parse(answer.text))
    if "list" in (gold.kind, answer.kind) and _several_inequalities(gold, answer):
        return symbolic.equal_solutions(_alternatives(gold), _alternatives(answer))
    return _same_solutions(gold.text, answer.text)


def _single(some: Shape) -> Shape | None:
    return some.items[0] if some.kind == "set" and len(some.items) == 1 else None


def _kinds_match(gold: Shape, answer: Shape) -> bool:
    """Equal brackets; a list without any may also be written as a set or a tuple."""
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
        # Cheap matches first: algebra on every pair would be slow.
        exact = [item for item in left if key(item.text) == key(wanted.text)]
        match = next(iter(exact), None) or next((a for a in left if _same(wanted, a, rule)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_solutions(gold: str, answer: str) -> bool:
    """Intervals, inequalities and number sets written in different ways: 0 < x < 1 and (0, 1)."""
    gold_set, answer_set = (
        bool(_INEQUALITY.search(text) or _SET.search(text)) for text in (gold, answer)
    )
    different_forms = bool(_INEQUALITY.search(gold)) != bool(_INEQUALITY.search(answer))
    unions = any("\\c" in text or "\\setminus" in text for text in (gold, answer))
    if gold_set and answer_set and (different_forms or unions or _INEQUALITY.search(gold)):
        return symbolic.equivalent_relations(_membership(gold), _membership(answer))
    return False


def _several_inequalities(gold: Shape, answer: Shape) -> bool:
    """Whether either side lists inequalities, x < 2 or x > 3, and the other is a set."""
    listed = [side for side in (gold, answer) if side.kind == "list"]
    others = [side for side in (gold, answer) if side.kind != "list"]
    return all(_INEQUALITY.search(item.text) for side in listed for item in side.items) and all(
        _SET.search(side.text) for side in others
    )


def _alternatives(side: Shape) -> list[str]:
    return [item.text for item in side.items] if side.kind == "list" else [_membership(side.text)]


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
        return _same_equation(gold, answer, len(answer_parts) > 1 or answer_name is not None)
    if gold_name and answer_name and differing_variables(gold_name, answer_name):
        return False
    if not _chain_holds(gold, answer_name, answer_parts, rule):
        return False
    given_value = _renamed(gold_name, answer_name, answer_parts[-1])
    return any(
        _same_value(wanted, given, rule)
        for wanted in _approximations(gold_parts[-1])
        for given in _approximations(given_value)
    )


def _renamed(gold_name: str | None, answer_name: str | None, value: str) -> str:
    """f(x) = 2x in the gold's variable, where it writes f(n) = 2n."""
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


def _chain_holds(gold: str, name: str | None, parts: list[str], rule: Rule) -> bool:
    """Whether `a = b = c` is a calculation that ends in its answer, not an equation in unknowns.

    `x^2 = 3` does not answer 3: its left side has letters and is not the gold's value.
    """
    if name is not None or len(parts) < 2 or not symbolic.has_letters(parts[0]):
        return True
    return _same_value(gold, parts[0], rule)


def _same_equation(gold: str, answer: str, answer_is_equation: bool) -> bool:
    return answer_is_equation and symbolic.equivalent_equations(gold, answer)


def _same_value(gold: str, answer: str, rule: Rule) -> bool:
    verdict = same_text(gold, answer, rule)
    if verdict is not None:
        return verdict.reason == rules.CORRECT
    if words(gold) is not None and words(gold) != words(answer):
        return False
    gold_number = number(gold)
    if gold_number is not None and not symbolic.has_letters(gold):
        answer = without_unit(answer)
    given = symbolic.parse(answer)
    if gold_number is not None:
        return _same_as_number(gold_number, given, rule)
    return _same_as_expression(symbolic.parse(gold), answer, given)


def _same_as_number(gold: Quantity, given: sympy.Basic, rule: Rule) -> bool:
    value = symbolic.value(given)
    if value is None:
        return False
    return (
        symbolic.same_number(symbolic.rational(gold.value), value)
        or symbolic.close(gold, value, rule)
        or _rounds_to(value, gold)
    )


def _same_as_expression(wanted: sympy.Basic, answer: str, given: sympy.Basic) -> bool:
    if symbolic.equal(wanted, given):
        return True
    answer_number, exact = quantity(answer), symbolic.value(wanted)
    return answer_number is not None and exact is not None and _rounds_to(exact, answer_number)


def _rounds_to(exact: sympy.Expr, decimal: Quantity) -> bool:
    return exact.is_real is not False and rounds_to(symbolic.fraction(exact), decimal)
