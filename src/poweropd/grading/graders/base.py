"""What every grader is: it reads golds, and submits completions for grading."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from poweropd.errors import UsageError, import_object, shown
from poweropd.grading import rules
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders import GRADERS, name_problem, split_name
from poweropd.grading.rules import Rule


@dataclass(frozen=True)
class Asked:
    """What a completion should answer.

    gold: what the grader's `gold` returned. row: the columns of the problem's data.
    place: says in messages which problem it is.
    """

    gold: object
    row: Mapping[str, object]
    rule: Rule = field(default_factory=Rule)
    place: str = ""


class NamedGrader(Protocol):
    """A grader that `create_grader` made."""

    @property
    def expected(self) -> str:
        """Returns what a gold must be, in words with {} for the name of its column."""

    @property
    def needs_gold(self) -> bool:
        """Returns whether a problem must have a gold answer."""

    def gold(self, value: object, row: Mapping[str, object]) -> object:
        """Returns the gold that a value states, as JSON can hold it.

        Raises ValueError, whose message goes on after "expected ..., ".
        """

    def question(self, text: str, row: Mapping[str, object]) -> str:
        """Returns a problem's text as a model should read it."""

    def submit(self, workers: Grader, asked: Asked, completion: str) -> "Future[Grade]":
        """Returns a future of the grade; raises RunError if the user's own code fails."""


class Plain:
    """What most graders have in common: they need a gold, and leave the question as it is."""

    needs_gold = True

    def question(self, text: str, row: Mapping[str, object]) -> str:
        """Returns the text as it is."""
        return text


def create_grader(key: str, named: str) -> NamedGrader:
    """Returns the grader of a name; raises UsageError about `key` if there is none."""
    problem = name_problem(named)
    if problem is not None:
        raise UsageError(f"{key}: {problem}, got {shown(named)}")
    name, argument = split_name(named)
    if name not in GRADERS:
        from poweropd.grading.graders.function import UserFunction

        function = import_object(key, named)
        if not callable(function):
            raise UsageError(f"{key}: expected a function, got {shown(named)}, which is none")
        return UserFunction(key, named, function)
    kind = import_object(key, GRADERS[name].home)
    made: NamedGrader = kind() if argument is None else kind(argument)
    return made


def graded(reason: str, answer: str | None, **further: float) -> "Future[Grade]":
    """Returns a future that holds a grade already; `further` are its further scores."""
    future: Future[Grade] = Future()
    right = reason == rules.CORRECT
    future.set_result(Grade(right, answer, reason, score=float(right), scores=further))
    return future
