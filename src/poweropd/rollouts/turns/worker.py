"""What the processes do in which tools run; they import nothing of ours beside this."""

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from poweropd.errors import UsageError, import_object, one_line
from poweropd.grading.workers import limit_memory

KEY = "rollout.tools"


class FailedCall(Exception):
    """A tool raised something, which may be nothing that another process could take."""


def prepare(names: Sequence[str]) -> None:
    """Prepares a worker once: limits its memory, sends what tools print nowhere, imports them."""
    limit_memory()
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    for named in names:
        with suppress(UsageError):  # which every call of that tool says
            import_object(KEY, named)


def import_in_worker(named: str) -> None:
    """Raises UsageError if a tool cannot be imported here."""
    import_object(KEY, named)


def call_in_worker(named: str, arguments: dict[str, object], limit: int) -> str:
    """Returns a tool's answer as text of about `limit` characters at most; raises FailedCall."""
    function = import_object(KEY, named)
    as_json = partial(json.dumps, ensure_ascii=False, default=str)
    try:
        value = function(**arguments)
        text = value if isinstance(value, str) else as_json(value)
    except Exception as error:  # the user's code may raise anything
        raise FailedCall(f"{type(error).__name__}: {one_line(str(error)[:limit])}") from error
    # Half of a surrogate pair, which no tokenizer takes, becomes a question mark.
    return cut_text(text, limit).encode("utf-8", "replace").decode()


def cut_text(text: str, limit: int) -> str:
    """Returns a text, or its first `limit` characters and how many there were."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
