"""Who answers the student between its turns: tools, or an environment of the user's."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

from poweropd.data.messages import Tool, Turn, read_turn
from poweropd.data.prompts import Prompt
from poweropd.errors import RunError, UsageError, import_object, one_line, shown
from poweropd.grading.graders.function import finite_number
from poweropd.rollouts.turns.calls import Reader, ToolCall
from poweropd.rollouts.turns.template import tool_turn
from poweropd.rollouts.turns.tools import Toolbox

KEY = "rollout.environment"
_Answer = TypeVar("_Answer")
_THOUGHTS_END = "</think>"  # a call that is only thought about is not made


class Partner(Protocol):
    """The other side of one conversation."""

    def submit(self, text: str) -> Sequence[Callable[[], Turn]]:
        """Returns what waits for each message that follows a turn; none ends the conversation."""

    def reward(self) -> float | None:
        """Returns the reward of the conversation so far; None if there is no such thing."""


class ToolPartner:
    """Answers the tool calls of a turn; a turn without any is the last one."""

    def __init__(self, toolbox: Toolbox, reader: Reader, schemas: Sequence[Tool]) -> None:
        self.toolbox, self.reader, self.schemas = toolbox, reader, schemas

    def submit(self, text: str) -> Sequence[Callable[[], Turn]]:
        """Starts the calls of a turn, which run side by side."""
        calls = self.reader(text.rpartition(_THOUGHTS_END)[2], self.schemas)
        return [self._started(call, number) for number, call in enumerate(calls)]

    def _started(self, call: ToolCall, number: int) -> Callable[[], Turn]:
        answer = self.toolbox.submit(call)
        return lambda: tool_turn(call.name, answer.result(), number)

    def reward(self) -> float | None:
        return None


@runtime_checkable
class Environment(Protocol):
    """What a class of the user's makes: one object for each completion, in this process.

    A method `reward() -> float` beside these is what `rollout.task_reward: {name: environment}`
    asks, when the conversation is over.
    """

    def reset(self, row: Mapping[str, object]) -> None:
        """Begins a conversation about a row of the data, before the student's first turn."""

    def step(self, text: str) -> Sequence[Mapping[str, object]] | str | None:
        """Returns the messages that follow a turn of the student; None ends the conversation.

        A text alone is one message of the user.
        """


def environment_class(named: str, rewarded: bool) -> Callable[[], Environment]:
    """Returns the class that "module:class" names; raises UsageError if it makes none.

    rewarded: whether its objects must have a reward.
    """
    kind = import_object(KEY, named)
    try:
        made = kind()
    except Exception as error:  # the user's code may raise anything
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise UsageError(f"{KEY}: {named}() raised {reason}") from error
    if not isinstance(made, Environment) or (rewarded and not hasattr(made, "reward")):
        wanted = "reset, step and reward" if rewarded else "reset and step"
        raise UsageError(f"{KEY}: expected {named} to be a class with {wanted}, got {shown(made)}")
    return kind


class EnvironmentPartner:
    """Answers by an environment of the user's; raises RunError, of one line, if that fails."""

    def __init__(self, named: str, kind: Callable[[], Environment], prompt: Prompt) -> None:
        self.named, self.place = named, f"for row {prompt.index}"
        self.environment = self._asked("reset", kind)
        self._asked("reset", lambda: self.environment.reset(prompt.row))

    def _asked(self, method: str, call: Callable[[], _Answer]) -> _Answer:
        try:
            return call()
        except Exception as error:  # the user's code may raise anything, and the run ends with it
            reason = one_line(f"{type(error).__name__}: {error}")[:300]
            raise RunError(f"{KEY} {self.named}: {method} raised {reason} {self.place}") from error

    def submit(self, text: str) -> Sequence[Callable[[], Turn]]:
        """Takes a step at once; its messages are there when it returns."""
        found = self._asked("step", lambda: self.environment.step(text))
        messages = [{"role": "user", "content": found}] if isinstance(found, str) else found or []
        where = f"{KEY} {self.named}: step: message"
        try:
            turns = [read_turn(one, f"{where} {i}") for i, one in enumerate(messages, start=1)]
        except UsageError as error:
            raise RunError(f"{error} {self.place}") from None
        except TypeError:
            raise RunError(
                f"{KEY} {self.named}: expected step to return messages, a text or None, got "
                f"{shown(found)} {self.place}"
            ) from None
        return [partial(dict[str, object], turn) for turn in turns]

    def reward(self) -> float | None:
        """Returns what the environment says; None if it says nothing."""
        if not hasattr(self.environment, "reward"):
            return None
        value = self._asked("reward", self.environment.reward)
        number = finite_number(value)
        if number is None:
            raise RunError(
                f"{KEY} {self.named}: expected a finite number of reward, got {shown(value)} "
                f"{self.place}"
            )
        return number
