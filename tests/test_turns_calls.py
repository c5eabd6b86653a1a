"""Tool calls in the forms of real chat templates, and templates that take them."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHATML, make_byte_tokenizer
from transformers import AutoTokenizer, GenerationConfig
from turn_cases import STOPS, TOOLS, make_writer

from poweropd import stops
from poweropd.errors import UsageError, import_object
from poweropd.rollouts.turns import TOOL_FORMATS
from poweropd.rollouts.turns.calls import ToolCall, read_hermes, reader_of
from poweropd.rollouts.turns.template import TurnWriter, tool_turn

CALL = ToolCall("find", {"what": "a b", "count": 2})
SCHEMA = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {
            "type": "object",
            "properties": {"what": {"type": "string"}, "count": {"type": "integer"}},
        },
    },
}
JSON = '{"what": "a b", "count": 2}'
#: Form -> the same call as models of that form write it.
WRITTEN = {
    "hermes": [
        f'Wait.\n<tool_call>\n{{"name": "find", "arguments": {JSON}}}\n</tool_call>',
        f'<tool_call>{{"name": "find", "arguments": {JSON}}}',
        '<tool_call>{"name": "find", "arguments": "{\\"what\\": \\"a b\\", \\"count\\": 2}"}',
    ],
    "qwen3_coder": [
        "<tool_call>\n<function=find>\n<parameter=what>\na b\n</parameter>\n<parameter=count>\n2\n"
        "</parameter>\n</function>\n</tool_call>"
    ],
    "llama3": [
        f'{{"name": "find", "parameters": {JSON}}}',
        f'<|python_tag|>{{"type": "function", "name": "find", "parameters": {JSON}}}',
    ],
    "mistral": [
        f'[TOOL_CALLS] [{{"name": "find", "arguments": {JSON}, "id": "abcdefghi"}}]',
        f"[TOOL_CALLS]find[ARGS]{JSON}",
        f"I look.[TOOL_CALLS]find[CALL_ID]abcdefghi[ARGS]{JSON}",
    ],
    "deepseek": [
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{JSON}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>find<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>",
    ],
}
#: Form -> texts that are meant as calls and are none.
MALFORMED = {
    "hermes": [
        "<tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "f", "arguments": 3}',
    ],
    "qwen3_coder": ["<tool_call>find(2)</tool_call>"],
    "llama3": ["<|python_tag|>find(2)", '{"name": 3}'],
    "mistral": ["[TOOL_CALLS]", '[TOOL_CALLS] [{"arguments": {}}]', "[TOOL_CALLS]find[ARGS]{oops"],
    "deepseek": ["<｜tool▁call▁begin｜>find<｜tool▁sep｜>{oops<｜tool▁call▁end｜>"],
}


def read(form: str, text: str) -> list[ToolCall]:
    found: list[ToolCall] = import_object("rollout.tool_format", TOOL_FORMATS[form])(text, [SCHEMA])
    return found


def test_every_form_is_tried() -> None:
    assert set(TOOL_FORMATS) == set(WRITTEN) == set(MALFORMED)


@pytest.mark.parametrize(("form", "text"), [(f, t) for f, texts in WRITTEN.items() for t in texts])
def test_a_call_is_read(form: str, text: str) -> None:
    assert read(form, text) == [CALL]


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_two_calls_are_read_in_their_order(form: str) -> None:
    text = WRITTEN[form][0]
    if form == "llama3":  # whose turn is one call
        assert len(read(form, text + text)) <= 1
        return
    assert read(form, text + text.replace("find", "seek")) == [
        CALL,
        ToolCall("seek", CALL.arguments),
    ]


@pytest.mark.parametrize(
    ("form", "text"), [(f, t) for f, texts in MALFORMED.items() for t in texts]
)
def test_a_malformed_call_is_told(form: str, text: str) -> None:
    (found,) = read(form, text)
    assert found.problem.startswith("expected a tool call with a name and arguments, got ")
    assert "\n" not in found.problem


@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize("text", ["", "It is 14.", '{"sum": 14}', "[1, 2]", "tool_call"])
def test_an_answer_is_no_call(form: str, text: str) -> None:
    assert read(form, text) == []


@given(st.sampled_from([*TOOL_FORMATS]), st.text(), st.sampled_from([0, 1, 2]))
def test_no_text_is_too_odd(form: str, text: str, beginning: int) -> None:
    whole = ["", WRITTEN[form][0][:25], "<tool_call>[TOOL_CALLS]<|python_tag|>"][beginning] + text
    for found in read(form, whole):
        assert found.problem or isinstance(found.arguments, dict)


# Templates.


def test_the_form_is_the_one_that_the_template_writes() -> None:
    assert reader_of(make_writer(), "auto") is read_hermes


#: Form -> how a template writes a call c of it.
IN_TEMPLATES = {
    "llama3": '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}',
    "mistral": '[TOOL_CALLS] [{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}]',
    "qwen3_coder": (
        "<tool_call>\n<function={{ c.name }}>\n{% for k, v in c.arguments.items() %}"
        "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    ),
    "deepseek": (
        "<｜tool▁call▁begin｜>{{ c.name }}<｜tool▁sep｜>{{ c.arguments + '' }}<｜tool▁call▁end｜>"
    ),
}


@pytest.mark.parametrize("form", IN_TEMPLATES)
def test_other_forms_are_found_in_their_templates(form: str) -> None:
    each = "{% for one in m.tool_calls or [] %}{% set c = one.function %}"
    calls = each + IN_TEMPLATES[form] + "{% endfor %}"
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}" + calls)
    writer = TurnWriter(make_byte_tokenizer(template), {}, STOPS)
    assert reader_of(writer, "auto") is import_object("", TOOL_FORMATS[form])


def test_a_template_without_calls_needs_the_name_of_their_form() -> None:
    writer = TurnWriter(make_byte_tokenizer(CHATML), {}, STOPS)
    with pytest.raises(
        UsageError, match=r"writes no tool calls that can be read \(known: hermes, "
    ):
        reader_of(writer, "auto")
    assert reader_of(writer, "hermes") is read_hermes


def test_the_librarys_own_parser_comes_first() -> None:
    pytest.importorskip("transformers.utils.chat_parsing")
    tokenizer = make_byte_tokenizer(TOOLS)
    calls = {"open": "<<", "close": ">>", "content": "json", "repeats": True}
    fields = {"content": {}, "tool_calls": calls}
    tokenizer.response_template = {"start_anchor": "assistant\n", "fields": fields}
    reader = reader_of(TurnWriter(tokenizer, {}, STOPS), "auto")
    assert reader("Let me see.", []) == []
    assert reader(f'Wait. <<{{"name": "find", "arguments": {JSON}}}>>', []) == [CALL]
    (broken,) = reader("<<oops>>", [])
    assert broken.problem


#: What is wrong -> a template with that.
DEAF = {
    r"none of <\|im_end\|> stands behind the turn before it": TOOLS.replace("<|im_end|>", "."),
    "its chat template fails: no tools": (
        "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + CHATML
    ),
    "it leaves the message or the turn before it out": CHATML.replace(
        "in messages %}", "in messages if m.role != 'tool' %}"
    ),
}


@pytest.mark.parametrize(("problem", "template"), DEAF.items())
def test_a_template_that_takes_no_tools_is_refused(problem: str, template: str) -> None:
    writer = TurnWriter(make_byte_tokenizer(template), {}, STOPS)
    with pytest.raises(UsageError, match=problem) as caught:
        writer.check("rollout.tools", tool_turn("tool", ""))
    assert str(caught.value).startswith("rollout.tools: the chat template of ")


# The tokenizers of real models: folders of tokenizer files below this one, if there are any.
REAL = Path(os.environ.get("POWEROPD_TOKENIZERS", "/nowhere"))
BEHIND = {
    "qwen3": (
        "\n<|im_start|>user\n<tool_response>\n14\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "llama3_1": (
        "<|start_header_id|>tool<|end_header_id|>\n\n14<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "deepseek_v3": (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>14<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    ),
    "gemma3": None,  # whose template takes no tools
}


@pytest.mark.parametrize("name", BEHIND)
def test_real_templates_are_continued_as_they_render_conversations(name: str) -> None:
    folder = next(REAL.glob(f"{name}/**/tokenizer_config.json"), None)
    if folder is None:
        pytest.skip("no such tokenizer here")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent)
    chat = {"enable_thinking": False}
    writer = TurnWriter(tokenizer, chat, stops.stop_ids(tokenizer, GenerationConfig()))
    tool, expected = tool_turn("find", "14"), BEHIND[name]
    if expected is None:
        with pytest.raises(UsageError, match="takes no message of role tool"):
            writer.check("rollout.tools", tool)
        return
    writer.check("rollout.tools", tool)
    ids = writer.ids([tool])
    assert tokenizer.decode(ids) == expected
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Let me see."},
        {"role": "user", "content": "Well?"},
    ]
    user = {"role": "user", "content": "Well?"}
    writer.check("rollout.environment", user)
    whole = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, **chat
    )
    behind = writer.ids([user])
    assert whole[-len(behind) :] == behind
    assert whole[-len(behind) - 1] in stops.stop_ids(tokenizer, GenerationConfig())
