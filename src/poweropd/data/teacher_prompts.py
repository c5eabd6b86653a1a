"""What the teacher alone reads: a prompt made from the columns of a row, and a system turn.

A template is text with names of columns in braces, such as "{problem}\\n\\nSolution: {solution}".
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from string import Formatter
from typing import TYPE_CHECKING

from poweropd.data.messages import Conversation, is_messages, read_conversation
from poweropd.data.sources import Row, check_unicode, column_names, value_at
from poweropd.errors import UsageError, import_object, one_line, shown

if TYPE_CHECKING:  # benchmarks need no pydantic
    from poweropd.config.data import DataConfig, TeacherTurnConfig

KEY = "data.teacher_prompt"
#: "package.module:function", which no template with a column looks like.
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Made = str | list[Mapping[str, object]]  # text, or chat messages
Make = Callable[[str, Row], Made]  # (place, row) -> what the teacher reads of it


@dataclass(frozen=True)
class Attempt:
    """The student's own completion and its grade, as further columns of a row."""

    completion: str
    grade: float
    feedback: str  # the grade in words


NO_ATTEMPT = Attempt("", 0.0, "")


class TeacherPrompts:
    """Makes the conversations that the teacher reads, where they are not the student's."""

    def __init__(self, data: "DataConfig") -> None:
        """Raises UsageError for a template or function that cannot be used."""
        self.system, self.feedback = data.teacher_system, data.feedback is not None
        self.make = None if data.teacher_prompt is None else _maker(data.teacher_prompt)

    def conversation(
        self, place: str, row: Row, own: Conversation, attempt: Attempt
    ) -> Conversation:
        """Returns what the teacher reads of a row; `own` is what the student reads.

        `attempt` counts if the recipe has `data.feedback`. A last message of the assistant is the
        beginning of the completion. Raises UsageError, which names place and column, for a row
        that lacks a column.
        """
        found = own
        if self.make is not None:
            columns = {**row, **asdict(attempt)} if self.feedback else row
            made = {KEY: self.make(place, columns)}
            found = replace(read_conversation(made, KEY, place), tools=own.tools)
        return found if self.system is None else found.with_system(self.system)


def _maker(prompt: "str | list[TeacherTurnConfig]") -> Make:
    """Returns what makes the prompts of a recipe's `data.teacher_prompt`."""
    if isinstance(prompt, list):
        turns = [(turn.role, Template(turn.content, f"{KEY}.{i}.content"))
                 for i, turn in enumerate(prompt)]  # fmt: skip
        return lambda place, row: [
            {"role": role, "content": template.filled(place, row)} for role, template in turns
        ]
    if FUNCTION.fullmatch(prompt):
        return _UserFunction(prompt)
    return Template(prompt, KEY).filled


class Template:
    """A text with names of columns in braces; {{ and }} stand for braces."""

    def __init__(self, text: str, key: str) -> None:
        """Raises UsageError about `key` for braces that are not around a column's name."""
        self.parts = list(_split(text, key))

    def filled(self, place: str, row: Row) -> str:
        """Returns the text with the row's values; raises UsageError for a column without one."""
        return "".join(
            literal + ("" if column is None else _column_text(place, row, column))
            for literal, column in self.parts
        )


def _split(text: str, key: str) -> Iterator[tuple[str, str | None]]:
    """Yields each literal text with the column behind it; None stands for none."""
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise _bad_braces(key, one_line(str(error))) from None
    for literal, column, form, conversion in parsed:
        if column == "" or form or conversion:
            raise _bad_braces(key, f"got {shown(f'{{{column}}}')} or more than a name")
        yield literal, column


def _bad_braces(key: str, problem: str) -> UsageError:
    return UsageError(
        f"{key}: expected the names of columns in braces, such as {{solution}}, and "
        f"{{{{ and }}}} for braces themselves; {problem}"
    )


def _column_text(place: str, row: Row, column: str) -> str:
    """Returns the text or number of a column as text; raises UsageError for anything else."""
    try:
        value = value_at(row, column)
    except KeyError:
        raise UsageError(
            f"{place}: {KEY}: expected column {column!r}, the columns are {column_names(row)}"
        ) from None
    if not isinstance(value, str | int | float):
        raise UsageError(
            f"{place}: {KEY}: expected text or a number in column {column!r}, got {shown(value)}"
        )
    text = f"{value:g}" if isinstance(value, float) else str(value)
    check_unicode(place, column, text)
    return text


class _UserFunction:
    """Calls a function (row) -> text or chat messages of the user's own."""

    def __init__(self, named: str) -> None:
        self.named, self.function = named, import_object(KEY, named)
        if not callable(self.function):
            raise UsageError(f"{KEY}: expected a function, got {shown(named)}, which is none")

    def __call__(self, place: str, row: Row) -> Made:
        try:
            made: Made = self.function(row)
        except Exception as error:  # the user's code may raise anything
            reason = one_line(f"{type(error).__name__}: {error}")[:300]
            raise UsageError(f"{place}: {KEY} {self.named}: it raised {reason}") from error
        if isinstance(made, str) or is_messages(made):
            return made
        raise UsageError(
            f"{place}: {KEY} {self.named}: expected text or chat messages, got {shown(made)}"
        )
