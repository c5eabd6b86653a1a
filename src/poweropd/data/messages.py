"""Chat messages of a row, checked and brought into the form that chat templates take."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from poweropd.data.sources import Row, check_unicode, column_names, text_at, value_at
from poweropd.errors import UNREADABLE, UsageError, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM_ROLES = ("system", "developer")

Turn = dict[str, Any]  # role and content, as chat templates take them
Part = dict[str, Any]  # of a content: type and text
Tool = dict[str, Any]  # the JSON schema of a tool, as chat templates take it


@dataclass(frozen=True)
class Conversation:
    """A prompt: the turns of a chat up to where the model goes on.

    A content is text or a list of text parts. If the last turn is the assistant's, the model
    continues it. `place` is where an error about it says that it is.
    """

    turns: list[Turn]
    tools: list[Tool] | None = None
    place: str = ""

    @classmethod
    def of_text(cls, text: str, place: str = "") -> "Conversation":
        """Returns the conversation of one user turn."""
        return cls([{"role": "user", "content": text}], place=place)

    @property
    def text(self) -> str | None:
        """Returns the text if it is one user turn of text and no more; else None."""
        only = self.turns[0] if len(self.turns) == 1 and self.tools is None else {}
        content = only.get("content") if only.get("role") == "user" else None
        return content if isinstance(content, str) else None

    @property
    def has_system(self) -> bool:
        """Returns whether it has a system turn of its own."""
        return any(turn["role"] in SYSTEM_ROLES for turn in self.turns)

    @property
    def continues(self) -> bool:
        """Returns whether the model continues a turn that the assistant has begun."""
        return bool(self.turns[-1]["role"] == "assistant")

    @property
    def last_user_text(self) -> str:
        """Returns the text of the user's last turn."""
        return next(content_text(turn) for turn in self.turns[::-1] if turn["role"] == "user")

    def with_ending(self, text: str) -> "Conversation":
        """Returns it with a text after that of the user's last turn."""
        turns = [dict(turn) for turn in self.turns]
        last = next(turn for turn in turns[::-1] if turn["role"] == "user")
        last["content"] = content_text(last) + text
        return replace(self, turns=turns)

    def with_system(self, text: str) -> "Conversation":
        """Returns it with this system turn, in place of any other."""
        turns = [turn for turn in self.turns if turn["role"] not in SYSTEM_ROLES]
        return replace(self, turns=[{"role": "system", "content": text}, *turns])

    def cut(self) -> "Conversation":
        """Returns it without the assistant's turns at its end."""
        turns = list(self.turns)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        return replace(self, turns=turns)


def is_messages(value: object) -> bool:
    """Returns whether a value is a list of mappings, and so means messages."""
    return isinstance(value, list) and any(isinstance(one, Mapping) for one in value)


def read_conversation(row: Row, column: str, place: str) -> Conversation:
    """Returns the prompt that a column holds: text, or a list of chat messages.

    Raises UsageError, which names place and column, for anything else.
    """
    try:
        value = value_at(row, column)
    except KeyError:
        raise UsageError(
            f"{place}: expected text or messages in column {column!r}, its columns are "
            f"{column_names(row)}"
        ) from None
    if isinstance(value, str) and value.strip():
        check_unicode(place, column, value)
        return Conversation.of_text(value, place)
    if not isinstance(value, list):
        raise UsageError(
            f"{place}: expected text or a list of messages in column {column!r}, got {shown(value)}"
        )
    turns = [read_turn(message, f"{place}: column {column!r}: message {i}")
             for i, message in enumerate(value, start=1)]  # fmt: skip
    if not any(turn["role"] == "user" for turn in turns):
        roles = ", ".join(turn["role"] for turn in turns) or "no message at all"
        raise UsageError(
            f"{place}: expected a message of the user in column {column!r}, got {roles}; add one "
            "or drop the row"
        )
    return Conversation(turns, place=place)


def read_turn(message: object, where: str) -> Turn:
    """Returns a message as a turn; raises UsageError, which begins with `where`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UsageError(f"{where}: expected a mapping with role and content, got {shown(message)}")
    turn = without_nulls(message)
    if turn["role"] not in ROLES:
        raise UsageError(
            f"{where}: expected a role of {', '.join(ROLES)}, got {shown(turn['role'])}"
        )
    calls = turn["role"] == "assistant" and turn.get("tool_calls")
    turn["content"] = _content(turn.get("content", "" if calls else None), where)
    if turn["role"] == "user" and not content_text(turn).strip():
        raise UsageError(
            f"{where}: expected text of the user, got nothing; fill it or drop the row"
        )
    if calls:
        turn["tool_calls"] = [_with_parsed_arguments(call) for call in turn["tool_calls"]]
    check_unicode(where, "content", content_text(turn))
    return turn


def _content(content: object, where: str) -> str | list[Part]:
    """Returns a content as text or as text parts; raises UsageError for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(f"{where}: expected text or text parts as content, got {shown(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise UsageError(
                f"{where}: expected parts of type text as content, got {shown(kind or part)}; only "
                "text can be trained on: drop the row"
            )
    return [{"type": "text", "text": part["text"]} for part in content]


def content_text(turn: Turn) -> str:
    """Returns the text of a turn, that of its parts on lines of their own, as servers join them."""
    content = turn["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _with_parsed_arguments(call: object) -> object:
    """Returns a tool call with its arguments as a mapping, as chat templates expect them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    parsed = _parsed(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": {**function, "arguments": parsed}}


def _parsed(text: str) -> object:
    """Returns the value of a JSON text, and any other text as it is."""
    try:
        return json.loads(text)
    except UNREADABLE:
        return text


def without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a mapping without its nulls, also in what it holds.

    Parquet gives every message and tool the fields of all others, null where it has none.
    """
    return dict(_pairs_without_nulls(value))


def _pairs_without_nulls(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if inner is not None:
            yield key, _without_inner_nulls(inner)


def _without_inner_nulls(value: object) -> object:
    if isinstance(value, Mapping):
        return without_nulls(value)
    return [_without_inner_nulls(one) for one in value] if isinstance(value, list) else value


def read_system(row: Row, column: str, place: str) -> str:
    """Returns the text of a row's system turn; "" if its value is null or blank."""
    try:
        if value_at(row, column) is None:
            return ""
    except KeyError:
        pass  # told below
    text = text_at(place, row, column, allow_empty=True)
    return text if text.strip() else ""


def read_tools(row: Row, column: str, place: str) -> list[Tool] | None:
    """Returns the tools of a row, given as a list or its JSON; None if it has none.

    Raises UsageError, which names place and column, for anything else.
    """
    try:
        value = value_at(row, column)
    except KeyError:
        raise UsageError(
            f"{place}: expected tools in column {column!r}, its columns are {column_names(row)}"
        ) from None
    tools = _parsed(value) if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UsageError(
            f"{place}: expected a list of tools in column {column!r}, each a mapping such as "
            f"{{type: function, function: ...}}, got {shown(value)}"
        )
    return [without_nulls(tool) for tool in tools]


def tool_name(tool: Mapping[str, Any]) -> str:
    """Returns the name of a tool's function; "" if it has none."""
    inner = tool.get("function")
    return str((inner if isinstance(inner, Mapping) else tool).get("name", ""))
