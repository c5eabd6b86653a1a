"""The two ways in which a command ends badly, how a message shows a value, and the import of code
that a recipe names, which is where most of these errors are raised.

A message is one line that says what was expected, what was got, where, and what to do.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

# What a module of the user's own may raise while it is imported.
IMPORT_FAILURES = (
    *(ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError),
    *(ArithmeticError, AssertionError, RuntimeError, OSError, IndexError),
)

# What reading JSON of anybody's raises; deep nesting raises the last, a long integer the first.
UNREADABLE = (ValueError, RecursionError)


class UsageError(ValueError):
    """The recipe, the command line or an input it names is wrong: exit status 2."""


class RunError(RuntimeError):
    """A run cannot go on: exit status 1. What was finished is kept."""


class DivergedError(RunError):
    """The numbers of a training left what can be computed: its learning rate is too high, say."""


def one_line(text: str) -> str:
    """Returns a text on one line, without characters that a terminal might obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shown(value: object, limit: int = 80) -> str:
    """Returns a value as a message shows it: on one line, printable, and of bounded length."""
    text = repr(value)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def import_object(key: str, name: str) -> Any:
    """Returns what "package.module:attribute" names; raises UsageError about `key` if it cannot."""
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise UsageError(f"{key}: expected package.module:function, got {shown(name)}")
    try:
        return vars(importlib.import_module(module))[attribute]
    except IMPORT_FAILURES as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UsageError(f"{key}: cannot import {name}: {reason}") from error
    except KeyError:
        raise UsageError(f"{key}: module {module} has no {attribute!r}") from None


def check_call(
    key: str, name: str, function: Callable[..., object], takes: str, keywords: Mapping[str, object]
) -> None:
    """Raises UsageError about `key` unless a user's function can be called in a way.

    takes: the names of its positional arguments, separated by commas. What Python cannot inspect,
    such as a function written in C, is not checked.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        return
    try:
        signature.bind(*takes.split(","), **keywords)
    except TypeError as error:
        given = "".join(f", {keyword}=..." for keyword in keywords)
        raise UsageError(
            f"{key}: {name} is called with ({takes}{given}), got a function {shown(signature)}: "
            f"{error}"
        ) from None
