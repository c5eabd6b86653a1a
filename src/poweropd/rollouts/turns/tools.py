"""The user's tools: Python functions that run in processes which can be killed.

Whatever a tool does, its call has an answer in time: what it returns, or a text that says what went
wrong, which the student reads and may react to.
"""

import atexit
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache, partial

from pebble import ProcessFuture
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
)

from poweropd.config.rollouts import RolloutConfig
from poweropd.data.messages import Tool
from poweropd.errors import UsageError, import_object, one_line
from poweropd.grading.workers import worker_pool
from poweropd.rollouts.turns.calls import ToolCall
from poweropd.rollouts.turns.worker import (
    KEY,
    FailedCall,
    call_in_worker,
    cut_text,
    import_in_worker,
    prepare,
)

SCHEMA_FAILURES = (DocstringParsingException, TypeHintParsingException, ValueError, TypeError)
ERROR = "error: "  # with which the answer to a call that failed begins


def tool_functions(names: Sequence[str]) -> dict[str, Callable[..., object]]:
    """Returns the functions that "module:function" names, by their own names.

    Raises UsageError if one cannot be imported, or is none.
    """
    found: dict[str, Callable[..., object]] = {}
    for named in names:
        function = import_object(KEY, named)
        if not callable(function) or not isinstance(getattr(function, "__name__", None), str):
            raise UsageError(f"{KEY}: expected a function, got {named}, which is none")
        if function.__name__ in found:
            raise UsageError(f"{KEY}: two functions are called {function.__name__}: rename one")
        found[function.__name__] = function
    return found


def tool_schemas(names: Sequence[str]) -> list[Tool] | None:
    """Returns the functions' JSON schemas as chat templates take them; None if there are none.

    They are made from type hints and docstrings. Raises UsageError for functions without them.
    """
    schemas = []
    for named, function in zip(names, tool_functions(names).values(), strict=True):
        try:
            schemas.append(get_json_schema(function))
        except SCHEMA_FAILURES as error:
            raise UsageError(
                f"{KEY}: {named}: expected a function with type hints and a docstring that "
                f"describes it and, below Args:, its arguments; got {one_line(str(error))[:300]}"
            ) from None
    return schemas or None


class Toolbox:
    """Calls tools by their names, in `workers` processes of their own.

    names: "module:function" of each. timeout: seconds that a call may take.
    max_chars: length of the longest answer; a longer one is cut.
    """

    def __init__(self, names: Sequence[str], timeout: float, workers: int, max_chars: int) -> None:
        self.homes = dict(zip(tool_functions(names), names, strict=True))
        self.timeout, self.max_chars = timeout, max_chars
        self._pool = worker_pool(workers, partial(prepare, names))
        # The first worker starts while models are being loaded.
        self._imports = [self._pool.schedule(import_in_worker, args=(one,)) for one in names]

    @classmethod
    def of(cls, section: RolloutConfig) -> "Toolbox":
        """Returns the toolbox of a recipe, one for all that use it in this process."""
        limits = (section.tool_timeout, section.tool_workers, section.tool_max_chars)
        return _shared_toolbox((*section.tool_names,), limits)

    def check(self) -> None:
        """Raises UsageError unless the tools can be imported where they will run."""
        for named, done in zip(self.homes.values(), self._imports, strict=True):
            try:
                done.result()
            except (UsageError, OSError, RuntimeError) as error:
                raise UsageError(f"{KEY}: {named}: {one_line(str(error))}") from None

    def submit(self, call: ToolCall) -> "Future[str]":
        """Returns a future of the answer to a call, which never holds an exception."""
        answer: Future[str] = Future()
        if call.problem or call.name not in self.homes:
            known = ", ".join(self.homes)
            problem = f"there is no tool {call.name!r}, only {known}"
            answer.set_result(self._cut(ERROR + (call.problem or problem)))
            return answer
        work = (self.homes[call.name], call.arguments, self.max_chars)
        done = self._pool.schedule(call_in_worker, args=work, timeout=self.timeout)
        done.add_done_callback(lambda done: answer.set_result(self._answer(done)))
        return answer

    def _answer(self, done: ProcessFuture) -> str:
        """Returns what a call has given, or what became of it."""
        if done.cancelled():
            return ERROR + "the call was given up"
        error = done.exception()
        if error is None:
            return str(done.result())
        if isinstance(error, TimeoutError):
            return f"{ERROR}no answer within {self.timeout:g} s"
        kind = "" if isinstance(error, FailedCall) else f"{type(error).__name__}: "
        return self._cut(ERROR + kind + one_line(str(error)))

    def _cut(self, text: str) -> str:
        return cut_text(text, self.max_chars)

    def close(self) -> None:
        """Ends the workers, whatever they do."""
        self._pool.stop()
        self._pool.join()


@cache
def _shared_toolbox(names: tuple[str, ...], limits: tuple[float, int, int]) -> Toolbox:
    toolbox = Toolbox(names, *limits)
    atexit.register(toolbox.close)
    return toolbox
