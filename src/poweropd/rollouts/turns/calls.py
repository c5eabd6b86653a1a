"""Reads tool calls out of a turn that a model wrote, in the form of its chat template."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedTokenizerBase

from poweropd.data.messages import Tool
from poweropd.errors import UNREADABLE, UsageError, import_object, one_line, shown
from poweropd.rollouts.turns import AUTO_FORMAT, TOOL_FORMATS
from poweropd.rollouts.turns.template import TurnWriter


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, or what is wrong with a text that was meant to be one."""

    name: str = ""
    arguments: dict[str, object] = field(default_factory=dict)
    problem: str = ""


#: (a turn without its stop token, the schemas of the tools) -> its calls; none for an answer.
Reader = Callable[[str, Sequence[Tool]], list[ToolCall]]

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\n]*)>(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>\n?(.*?)\n?(?:</parameter>|$)", re.DOTALL)
_MISTRAL = re.compile(r"\s*(?P<name>[^\s\[{]+)(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<old>[^\n]*)\n```json\n|"
    r"(?P<new>.*?)<｜tool▁sep｜>)(?P<arguments>.*?)\s*(?:```)?\s*(?:<｜tool▁call▁end｜>|$)",
    re.DOTALL,
)
_PYTHON_TAG, _TOOL_CALLS = "<|python_tag|>", "[TOOL_CALLS]"


def read_hermes(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Reads `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, of Qwen and Hermes."""
    return [_call_in(_json_value(found)) for found in _HERMES.findall(text)]


def read_qwen3_coder(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Reads `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...`, of Qwen3-Coder.

    A value is JSON, or text if the tool's schema says so.
    """
    return [
        call
        for inside in _HERMES.findall(text)
        for call in _calls_in_tags(inside, tools) or [_malformed(inside)]
    ]


def _calls_in_tags(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    found = []
    for name, body in _FUNCTION.findall(text):
        types = _types(name.strip(), tools)
        arguments = {
            key.strip(): value if types.get(key.strip()) == "string" else _loaded(value)
            for key, value in _PARAMETER.findall(body)
        }
        found.append(ToolCall(name.strip(), arguments))
    return found


def _types(name: str, tools: Sequence[Tool]) -> dict[str, object]:
    """Returns the types of a tool's parameters, by their names."""
    functions = [tool.get("function", tool) for tool in tools]
    own: Tool = next((one for one in functions if one.get("name") == name), {})
    properties = own.get("parameters", {}).get("properties", {})
    return {key: value.get("type") for key, value in properties.items()}


def read_llama3(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Reads `{"name": ..., "parameters": {...}}` as the whole turn, of Llama 3.1 and later."""
    tagged = text.lstrip().startswith(_PYTHON_TAG)
    body = text.strip().removeprefix(_PYTHON_TAG).strip()
    value = _json_value(body) if tagged or body.startswith("{") else None
    if tagged or (isinstance(value, Mapping) and "name" in value):
        return [_call_in(value)]
    return []  # an answer, which may be JSON, too


def read_mistral(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Reads `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]NAME[ARGS]{...}`,
    as Mistral's newer models write it.
    """
    return [call for body in text.split(_TOOL_CALLS)[1:] for call in _mistral_calls(body)]


def _mistral_calls(body: str) -> Iterator[ToolCall]:
    named = _MISTRAL.match(body)
    if named is not None:
        arguments = _json_value(body[named.end() :].strip())
        yield _call_in({"name": named["name"], "arguments": arguments})
        return
    value = _json_value(body.strip())
    for one in value if isinstance(value, list) else [value]:
        yield _call_in(one)


def read_deepseek(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Reads the calls of DeepSeek V3 (arguments in a block of code), and of V3.1 (without it)."""
    return [
        _call_in(
            {"name": found["old"] or found["new"], "arguments": _json_value(found["arguments"])}
        )
        for found in _DEEPSEEK.finditer(text)
    ]


@dataclass(frozen=True)
class _Unreadable:
    """A text that is no JSON."""

    text: str
    reason: str


def _json_value(text: str) -> object:
    """Returns the value of a JSON text, or why it is none."""
    try:
        return json.loads(text)
    except UNREADABLE as error:
        return _Unreadable(text, one_line(str(error)))


def _loaded(text: str) -> object:
    """Returns the value of a JSON text, and any other text as it is."""
    value = _json_value(text)
    return text if isinstance(value, _Unreadable) else value


def _call_in(value: object) -> ToolCall:
    """Returns the call that a JSON value states, or what is wrong with it."""
    if isinstance(value, _Unreadable):
        return _malformed(value.text, value.reason)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return _malformed(json.dumps(value, ensure_ascii=False))
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments = _loaded(arguments) if isinstance(arguments, str) else arguments
    if isinstance(arguments, _Unreadable):
        return _malformed(arguments.text, arguments.reason)
    if not isinstance(arguments, Mapping):
        return _malformed(json.dumps(value, ensure_ascii=False), "arguments is no mapping")
    return ToolCall(value["name"], dict(arguments))


def _malformed(text: str, reason: str = "it has no name") -> ToolCall:
    return ToolCall(problem=f"expected a tool call with a name and arguments, got {shown(text)}: "
                    f"{reason}")  # fmt: skip


def reader_of(writer: TurnWriter, form: str) -> Reader:
    """Returns what reads a model's calls: `form` is the value of `rollout.tool_format`.

    With `auto` it is transformers' own parser if the tokenizer has a response template; else the
    form from which a call can be read that the chat template itself has written. Raises UsageError
    if there is none.
    """
    if form != AUTO_FORMAT:
        reader: Reader = import_object("rollout.tool_format", TOOL_FORMATS[form])
        return reader
    # An attribute that newer versions of transformers have.
    if getattr(writer.tokenizer, "response_template", None) is not None:
        return partial(_read_by_library, writer.tokenizer)
    call = ToolCall("find_it", {"what": "seven", "count": 2})
    for text in writer.calls(call.name, call.arguments):
        for home in TOOL_FORMATS.values():
            reader = import_object("rollout.tool_format", home)
            if reader(text, []) == [call]:
                return reader
    raise UsageError(
        f"rollout.tools: the chat template of {writer.tokenizer.name_or_path} writes no tool calls "
        f"that can be read (known: {', '.join(TOOL_FORMATS)}): set rollout.tool_format to the form "
        "that the student writes, or let a class of yours read its turns (rollout.environment)"
    )


def _read_by_library(
    tokenizer: PreTrainedTokenizerBase, text: str, tools: Sequence[Tool]
) -> list[ToolCall]:
    """Reads the calls of a turn by the tokenizer's own response template."""
    try:
        message = tokenizer.parse_response(text, prefix="", tools=list(tools))
    except (ValueError, KeyError, TypeError) as error:
        return [_malformed(text, one_line(str(error)))]
    return [_call_in(call.get("function", call)) for call in message.get("tool_calls") or []]
