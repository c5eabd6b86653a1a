"""Graders by name: `math`, `exact`, `contains`, `choice`, `regex`, `json`, or one's own function.

Their table is here, free of heavy imports; `base.create_grader` makes the grader of a name.
"""

import re
import warnings
from typing import Literal, NamedTuple


class GraderFacts(NamedTuple):
    """What is known of a grader before its module is imported."""

    home: str  # "module:class", which `argument` makes
    argument: str = ""  # what may stand behind the name and a colon, in capitals
    needs: Literal["none", "optional", "required"] = "none"


_ROOM = "poweropd.grading.graders"
GRADERS = {
    "math": GraderFacts(f"{_ROOM}.mathematics:Mathematics"),
    "exact": GraderFacts(f"{_ROOM}.text:Exact"),
    "contains": GraderFacts(f"{_ROOM}.text:Contains"),
    "choice": GraderFacts(f"{_ROOM}.choice:Choice", "COLUMN", "optional"),
    "regex": GraderFacts(f"{_ROOM}.pattern:Pattern", "PATTERN", "required"),
    "json": GraderFacts(f"{_ROOM}.structure:JsonAnswer", "KEY,KEY", "optional"),
}
#: Former and other names -> the grader's name in the table.
ALIASES = {"grader": "math"}
_FUNCTION = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


def split_name(named: str) -> tuple[str, str | None]:
    """Returns the name of the table and what follows its colon; the name of a function is whole."""
    name, colon, argument = named.partition(":")
    name = ALIASES.get(name, name)
    return (name, argument if colon else None) if name in GRADERS else (named, None)


def known_graders() -> str:
    """Returns how every grader is written, for messages."""
    forms = {
        "none": "{name}",
        "optional": "{name}, {name}:{argument}",
        "required": "{name}:{argument}",
    }
    table = [forms[f.needs].format(name=n, argument=f.argument) for n, f in GRADERS.items()]
    return ", ".join([*table, "package.module:function"])


def name_problem(named: str) -> str | None:
    """Returns why a text names no grader; None if it does. Nothing is imported."""
    name, argument = split_name(named)
    if name not in GRADERS:
        return None if _FUNCTION.fullmatch(name) else f"expected one of {known_graders()}"
    facts = GRADERS[name]
    if argument is None:
        needed = facts.needs == "required"
        return f"expected {name}:{facts.argument}, got no {facts.argument.lower()}" * needed or None
    if facts.needs == "none":
        return f"expected {name} alone, for it takes no argument"
    if not argument.strip():
        return f"expected something behind the colon: {name}:{facts.argument}"
    return pattern_problem(argument) if name == "regex" else None


def pattern_problem(pattern: str) -> str | None:
    """Returns why a text is no regular expression; None if it is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that will be read otherwise some day
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"expected a regular expression, and this is none: {error}"
    return None
