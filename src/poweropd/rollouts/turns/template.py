"""Writes what stands between two turns of the student, as its chat template has it.

What the student sampled stays as it is. A conversation is rendered in which a marker takes its
place; the text behind the marker's turn, up to where the student goes on, is what is added.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from poweropd.data.chat import content_form, render_chat
from poweropd.data.messages import Turn
from poweropd.errors import UsageError

_MARKER = "the turn that was sampled"
_PROBE = "42"


def tool_turn(name: str, text: str, number: int = 0) -> Turn:
    """Returns the message in which a tool answers call `number` of a turn."""
    # Some templates insist on an id of nine letters and digits.
    return {"role": "tool", "name": name, "tool_call_id": f"call{number:05d}", "content": text}


class TurnWriter:
    """Writes messages in the student's tokens, from its stop token to the point where it goes on.

    tokenizer: the student's. chat, system: as in the recipe's data.
    stop_ids: what ends a turn. left_out: ids that student and teacher do not share; a message
    loses them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat: Mapping[str, object],
        stop_ids: Sequence[int],
        *,
        system: str | None = None,
        left_out: Collection[int] = (),
    ) -> None:
        self.tokenizer, self.chat, self.left_out = tokenizer, chat, left_out
        self.stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids]
        self.form = content_form(tokenizer, chat, system)
        self.opening: list[Turn] = [{"role": "user", "content": self.form("?")}]
        if system:
            self.opening.insert(0, {"role": "system", "content": self.form(system)})
        self.names_calls = False  # whether tools are answered behind the calls they answer

    def check(self, key: str, probe: Turn) -> None:
        """Raises UsageError about `key` unless the template takes such a message."""
        probe = {**probe, "content": _PROBE}
        problem = "it leaves the message or the turn before it out"
        for self.names_calls in (True, False):  # the way that works is kept
            try:
                text = self._behind([probe])
            except UsageError as error:
                problem = str(error)
                continue
            if _PROBE in text:
                self._check_begin_alike(key, self._encoded(text))
                return
        raise UsageError(
            f"{key}: the chat template of {self.tokenizer.name_or_path} takes no message of role "
            f"{probe['role']} behind the model's turn ({problem}): give the student a template "
            "that does"
        )

    def _check_begin_alike(self, key: str, ids: Sequence[int]) -> None:
        held = next((i for i in ids if i in self.left_out), None)
        if held is not None:
            raise UsageError(
                f"{key}: the chat template writes {self.tokenizer.convert_ids_to_tokens(held)} (id "
                f"{held}) between turns, which is not the same token to student and teacher: give "
                "the student a template without it"
            )

    def ids(self, messages: Sequence[Turn]) -> list[int]:
        """Returns the ids of messages and of the beginning of the student's next turn."""
        return [i for i in self._encoded(self._behind(messages)) if i not in self.left_out]

    def _behind(self, messages: Sequence[Turn]) -> str:
        """Returns what is rendered from the stop token of the student's turn on."""
        formed = [{**turn, "content": self.form(turn["content"])} for turn in messages]
        turns = [*self.opening, self._students_turn(messages), *formed]
        rest = render_chat(self.tokenizer, turns, self.chat).partition(_MARKER)[2]
        places = [rest.find(stop) for stop in self.stops if stop in rest]
        if not places:
            raise UsageError(f"none of {', '.join(self.stops)} stands behind the turn before it")
        return rest[min(places) :]

    def _encoded(self, text: str) -> list[int]:
        """Returns the ids of a text that begins with a stop token, without that."""
        # Behind its stop token a text is encoded as it is in the whole conversation.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])[1:]

    def _students_turn(self, messages: Sequence[Turn]) -> Turn:
        """Returns the turn that stands for the student's."""
        turn: Turn = {"role": "assistant", "content": self.form(_MARKER)}
        tools = [one for one in messages if one["role"] == "tool"]
        if tools and self.names_calls:
            turn["tool_calls"] = [
                _call(one.get("name", "tool"), {}, one.get("tool_call_id", "")) for one in tools
            ]
        return turn

    def calls(self, name: str, arguments: Mapping[str, object]) -> Iterator[str]:
        """Yields a turn with one tool call as the template writes it, in each form it takes."""
        answer = {"role": "assistant", "content": self.form(_MARKER)}
        plain = render_chat(self.tokenizer, [*self.opening, answer], self.chat)
        for given in (arguments, json.dumps(arguments)):
            calls = [_call(name, given, "call00000")]
            turn = {"role": "assistant", "content": self.form(""), "tool_calls": calls}
            try:
                text = render_chat(self.tokenizer, [*self.opening, turn], self.chat)
            except UsageError:  # it refuses this form
                continue
            before = _begin_alike(plain, text)
            after = _begin_alike(plain[before:][::-1], text[before:][::-1])
            yield text[before : len(text) - after].strip()


def _begin_alike(one: str, other: str) -> int:
    """Returns the number of characters with which both texts begin."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _call(name: str, arguments: object, id: str) -> dict[str, object]:
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function}
