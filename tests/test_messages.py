"""Prompts as chat messages: the formats of other trainers, histories, tools, and bad messages."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_sources import as_csv, as_jsonl, as_parquet, write
from tiny_models import CHATML, PARTS, make_byte_tokenizer
from transformers import PreTrainedTokenizerBase

from poweropd import Config
from poweropd.data import chat
from poweropd.data.messages import Conversation
from poweropd.data.prompts import load_prompts
from poweropd.errors import UsageError

# Writes tools and tool calls as JSON, and otherwise what ChatML does.
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Think."}, USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 0, "split": "train"},
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return make_byte_tokenizer(TOOLS)


@pytest.fixture
def load(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, recipe: Callable[..., Config]
) -> Callable[..., list[str]]:
    """Loads prompts of rows or of a file; returns their texts, as the student reads them."""

    def loaded(rows: list[dict[str, Any]] | str, **keys: Any) -> list[str]:
        path = rows if isinstance(rows, str) else write(tmp_path / "rows.jsonl", as_jsonl(rows))
        config = recipe(data={"prompts": path, **keys})
        found = load_prompts(config.data, tokenizer, {"": tokenizer})
        return [tokenizer.decode(prompt.prompt_ids) for prompt in found]

    return loaded


def chatml(*turns: tuple[str, str], open_turn: str = "assistant\n") -> str:
    closed = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    return f"{closed}<|im_start|>{open_turn}"


ASKED = chatml(("user", "2+2?"))


def test_trl_and_verl_rows_load_as_they_are(load: Any, tmp_path: Path) -> None:
    trl = [{"prompt": [USER]}, {"prompt": [USER, ANSWER, {"role": "user", "content": "Why?"}]}]
    history = chatml(("user", "2+2?"), ("assistant", "It is 4"), ("user", "Why?"))
    assert load(trl) == [ASKED, history]
    verl = load(write(tmp_path / "train.parquet", as_parquet([VERL, VERL])))
    assert verl == [chatml(("system", "Think."), ("user", "2+2?"))] * 2
    cells = as_csv([{"id": 1, "messages": json.dumps([USER])}])
    assert load(write(tmp_path / "rows.csv", cells)) == [ASKED]


@pytest.mark.parametrize("column", ["problem", "prompt", "messages", "question"])
def test_auto_finds_the_column(load: Any, column: str) -> None:
    assert load([{"x": "1", column: "2+2?"}]) == [ASKED]


def test_auto_takes_problem_first_and_names_the_columns_where_it_finds_none(load: Any) -> None:
    assert load([{"prompt": "no", "problem": "2+2?"}]) == [ASKED]
    message = r"rows\.jsonl:1: data\.column=auto looks for problem, .* columns are text, meta\.x: "
    with pytest.raises(UsageError, match=message):
        load([{"text": "2+2?", "meta": {"x": 1}}])


def test_nested_columns_and_text_parts(load: Any) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "2", "image": None},
                                         {"type": "text", "text": "+2?"}]}  # fmt: skip
    assert load([{"raw": {"chat": [parts]}}], column="raw.chat") == [chatml(("user", "2\n+2?"))]


def test_parts_stay_parts_for_a_template_that_takes_them() -> None:
    content = [{"type": "text", "text": text} for text in ("2+", "2?")]
    tokenizer = make_byte_tokenizer(PARTS)
    prompt = Conversation([{"role": "user", "content": content}])
    (ids,) = chat.encode_chat(tokenizer, [prompt], {})
    assert tokenizer.decode(ids) == ASKED


def test_an_answer_at_the_end_is_left_out_or_continued(
    load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER]}]
    with caplog.at_level(logging.WARNING, "poweropd"):
        assert load(rows) == [ASKED, ASKED]
    assert "1 of 2 prompts end with a message of the assistant, which is left out" in caplog.text
    begun = chatml(("user", "2+2?"), open_turn="assistant\nIt is 4")
    assert load(rows, continue_assistant=True) == [begun, ASKED]
    empty = [{"messages": [USER, {"role": "assistant", "content": " "}]}]
    with pytest.raises(UsageError, match=r"rows\.jsonl:1: .*: message 2: expected text to contin"):
        load(empty, continue_assistant=True)


def test_a_rows_own_system_turn_comes_before_the_recipes(load: Any) -> None:
    own = {"role": "system", "content": "Own."}
    rows = [
        {"prompt": [own, USER], "hint": "Column."},
        {"prompt": [USER], "hint": "Column."},
        {"prompt": "2+2?", "hint": "Column."},
        {"prompt": "2+2?", "hint": ""},
        {"prompt": [USER], "hint": None},
    ]
    expected = ["Own.", "Column.", "Column.", "Recipe.", "Recipe."]
    asked = [chatml(("system", text), ("user", "2+2?")) for text in expected]
    assert load(rows, system_column="hint", system="Recipe.") == asked
    assert load(rows[:1], system="Recipe.") == asked[:1]


def test_tools_reach_the_template(load: Any, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "content": "4"}]  # fmt: skip
    row = {"prompt": turns, "tools": [TOOL]}
    expected = f"<|im_start|>tools\n{json.dumps([TOOL])}<|im_end|>\n" + chatml(
        ("user", "2+2?"), ("assistant", '{"a": 2}'), ("tool", "4")
    )
    assert load([row], tools_column="tools") == [expected]
    assert load([row | {"tools": json.dumps([TOOL])}], tools_column="tools") == [expected]
    without = load([row | {"tools": None}], tools_column="tools")
    assert without == [expected[expected.index("<|im_start|>user") :]]
    # Parquet gives both tools the properties of either, null where a tool has none.
    other = {"type": "function", "function": {"name": "say", "parameters": {
        "type": "object", "properties": {"text": {"type": "string"}}}}}  # fmt: skip
    table = as_parquet([{"prompt": [USER], "tools": [TOOL, other]}])
    (text,) = load(write(tmp_path / "tools.parquet", table), tools_column="tools")
    assert json.dumps([TOOL, other]) in text


def test_a_template_that_leaves_tools_or_turns_out_is_refused(load: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    with pytest.raises(UsageError, match=r"rows\.jsonl:1: .* leaves out the tool 'add'"):
        load([{"prompt": "2+2?", "tools": [TOOL]}], tools_column="tools")
    tokenizer.chat_template = CHATML.replace(
        "m['content']", "m['content'] if m['role'] == 'user' else ''"
    )
    with pytest.raises(UsageError, match="leaves the assistant's text out"):
        load([{"prompt": [USER, ANSWER, USER]}])


IMAGE = {"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text"}]}
BAD: dict[str, tuple[object, str]] = {
    "no user": ([{"role": "system", "content": "Hi"}], "expected a message of the user .* system;"),
    "only an answer": ([ANSWER], "expected a message of the user .* got assistant;"),
    "none": ([], "expected a message of the user .* got no message at all"),
    "image": ([IMAGE], "message 1: expected parts of type text as content, got 'image'; only"),
    "role": ([USER, {"role": "bot", "content": "x"}], "message 2: expected a role of .* 'bot'"),
    "empty": ([{"role": "user", "content": "  "}], "message 1: expected text of the user"),
    "no content": ([{"role": "user"}], "message 1: expected text or text parts .* got None"),
    "other keys": ([{"from": "human", "value": "x"}], "expected a mapping with role and content"),
    "text in a list": (["2+2?"], "message 1: expected a mapping with role and content, got '2"),
    "number": (3, "expected text or a list of messages in column 'prompt', got 3"),
    "blank": (" ", "expected text or a list of messages in column 'prompt', got ' '"),
    "null": (None, "expected text or a list of messages in column 'prompt', got None"),
    "surrogate": ([{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_prompt_is_one_line_that_names_the_row(load: Any, name: str) -> None:
    value, message = BAD[name]
    with pytest.raises(UsageError, match=rf"rows\.jsonl:2: .*{message}") as caught:
        load([{"prompt": "good"}, {"prompt": value}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tools", ["no JSON", 3, ["add"], {"name": "add"}])
def test_bad_tools_are_one_line_that_names_the_row(load: Any, tools: object) -> None:
    with pytest.raises(UsageError, match=r"rows\.jsonl:1: expected a list of tools in column"):
        load([{"prompt": "2+2?", "tools": tools}], tools_column="tools")
    with pytest.raises(UsageError, match=r"expected tools in column 'calls', its columns are"):
        load([{"prompt": "2+2?"}], tools_column="calls")


def test_what_a_template_refuses_names_the_row(load: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace(
        "{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{% for", 1)  # fmt: skip
    rows = [{"prompt": "2+2?"}, {"prompt": [{"role": "system", "content": "x"}, USER]}]
    with pytest.raises(UsageError, match=r"rows\.jsonl:2: .*its chat template fails: no system"):
        load(rows)


def test_messages_need_a_template(load: Any) -> None:
    assert load([{"prompt": "2+2?"}], chat=None) == ["2+2?"]
    with pytest.raises(UsageError, match=r"rows\.jsonl:1: messages, .* need the chat template"):
        load([{"prompt": [USER]}, {"prompt": "x"}, {"prompt": [USER, ANSWER, USER]}][2:], chat=None)


def test_a_limit_reads_no_further_rows(load: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", as_jsonl([{"prompt": "2+2?"}] * 3) + b"{broken")
    assert load(path, limit=3) == [ASKED] * 3
    with pytest.raises(UsageError, match=r"rows\.jsonl:4"):
        load(path, limit=4)
