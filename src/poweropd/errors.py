"""The two ways in which a command ends badly, and how a message shows a value.

A message is one line that says what was expected, what was got, where, and what to do.
"""


class UsageError(ValueError):
    """The recipe, the command line or an input it names is wrong: exit status 2."""


class RunError(RuntimeError):
    """A run cannot go on: exit status 1. What was finished is kept."""


def one_line(text: str) -> str:
    """Returns a text on one line, without characters that a terminal might obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shown(value: object, limit: int = 80) -> str:
    """Returns a value as a message shows it: on one line, printable, and of bounded length."""
    text = repr(value)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
