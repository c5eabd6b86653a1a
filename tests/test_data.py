"""Prompts: sources, mistakes in them, order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from poweropd.config import Config
from poweropd.data import chat, sources
from poweropd.data import prompts as data_prompts
from poweropd.embedded import task
from poweropd.errors import UsageError

ROWS = [{"problem": "1+2", "hint": "3"}, {"problem": "4+5", "hint": "9"}]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_jsonl_and_parquet_hold_the_same_rows(jsonl: Path, tmp_path: Path) -> None:
    parquet = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet)
    assert sources.read_rows(str(jsonl), ["problem"]) == ROWS
    assert sources.read_rows(str(parquet), ["problem"]) == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"prompts.jsonl:3: expected one JSON object per line"),
        ("[1]", r"prompts.jsonl:3: expected a JSON object, got list"),
        ('{"question": "?"}', r"prompts.jsonl:3: expected text in column 'problem', its columns"),
        ('{"problem": 3}', r"prompts.jsonl:3: expected text in column 'problem', got 3"),
        ('{"problem": " "}', r"prompts.jsonl:3: expected text in column 'problem', got ' '"),
    ],
)
def test_a_bad_line_is_named(jsonl: Path, line: str, message: str) -> None:
    with jsonl.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UsageError, match=message):
        sources.read_rows(str(jsonl), ["problem"])


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.jsonl: cannot read it \(No such file"):
        sources.read_rows(str(tmp_path / "none.jsonl"), ["problem"])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UsageError, match="expected at least one row, got none"):
        sources.read_rows(str(empty), ["problem"])
    broken = tmp_path / "broken.parquet"
    broken.write_text("no parquet")
    with pytest.raises(UsageError, match="cannot read it as a Parquet file"):
        sources.read_rows(str(broken), ["problem"])


def test_an_embedded_split_has_problems_and_answers() -> None:
    rows = sources.read_rows("embedded:development", ["problem", "answer"])
    expected = task.problems("development", len(rows))
    assert [(r["id"], r["problem"], r["answer"]) for r in rows] == [
        (p.id, p.problem, p.answer) for p in expected
    ]


def test_an_unknown_embedded_split_is_named() -> None:
    with pytest.raises(UsageError, match="train, development, evaluation"):
        sources.read_rows("embedded:test", ["problem"])


def test_prompts_end_where_the_models_turn_begins(student_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    (ids,) = chat.encode_chat(tokenizer, ["1+2"], {"enable_thinking": False}, system="Add.")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+2<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    (plain,) = chat.encode_chat(tokenizer, ["1+2"], None)
    assert tokenizer.decode(plain) == "1+2"
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match=r"set data\.chat=null"):
        chat.encode_chat(tokenizer, ["1+2"], {})


def test_the_teacher_may_see_another_prompt(
    jsonl: Path, student_dir: Path, recipe: Callable[..., Config]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    config = recipe(**{"data.prompts": str(jsonl), "data.teacher_column": "hint"})
    first = data_prompts.load_prompts(config.data, tokenizer, {"": tokenizer})[0]
    assert "1+2" in tokenizer.decode(first.prompt_ids)
    assert "1+2" not in tokenizer.decode(first.teacher_prompt_ids)


def test_a_prompt_that_leaves_no_room_is_named() -> None:
    prompts = [data_prompts.Prompt(0, [1] * 5, [1] * 5), data_prompts.Prompt(1, [1] * 9, [1] * 12)]
    data_prompts.check_lengths(prompts, 20, 20, max_new_tokens=8)
    with pytest.raises(
        UsageError, match=r"row 1: a prompt of 12 tokens .* teacher's context of 18"
    ):
        data_prompts.check_lengths(prompts, 18, 18, max_new_tokens=8)


def test_every_row_comes_once_per_epoch_in_an_order_of_the_seed() -> None:
    order = data_prompts.PromptOrder(count=10, seed=3)
    steps = [order.at_step(step, 4) for step in range(5)]
    flat = [row for rows in steps for row in rows]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert order.at_step(3, 4) == data_prompts.PromptOrder(10, 3).at_step(3, 4) == steps[3]
    assert data_prompts.PromptOrder(10, 4).at_step(0, 10) != order.at_step(0, 10)
    assert data_prompts.PromptOrder(3, 0, shuffle=False).at_step(1, 4) == [1, 2, 0, 1]


@given(st.integers(2, 40), st.integers(0, 2**32 - 1), st.data())
def test_held_out_prompts_are_the_seeds_and_no_others(count: int, seed: int, draw: Any) -> None:
    prompts = [data_prompts.Prompt(i, [i], [i]) for i in range(count)]
    size = draw.draw(st.integers(0, count - 1))
    trained, held = data_prompts.split_holdout(prompts, size, seed)
    assert len(held) == size
    assert sorted(p.index for p in [*trained, *held]) == list(range(count))
    assert trained == sorted(trained, key=lambda p: p.index)
    assert data_prompts.split_holdout(prompts, size, seed) == (trained, held)


def test_another_seed_holds_out_others() -> None:
    prompts = [data_prompts.Prompt(i, [i], [i]) for i in range(100)]
    one, other = (data_prompts.split_holdout(prompts, 20, seed)[1] for seed in (0, 1))
    assert one != other


def test_a_copy_of_a_held_out_prompt_is_not_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [data_prompts.Prompt(i, [i // 2], [i // 2]) for i in range(8)]
    trained, held = data_prompts.split_holdout(prompts, 2, seed=1)
    assert not {p.prompt_ids[0] for p in trained} & {p.prompt_ids[0] for p in held}
    assert "read the same as a held-out one" in caplog.text
    with pytest.raises(UsageError, match="all 7 prompts beside the 1 held-out ones read the same"):
        data_prompts.split_holdout([data_prompts.Prompt(i, [1], [1]) for i in range(8)], 1, 0)


def test_a_holdout_leaves_something_to_train_on() -> None:
    prompts = [data_prompts.Prompt(i, [i], [i]) for i in range(3)]
    with pytest.raises(UsageError, match=r"expected fewer than the 3 prompts .* got 3"):
        data_prompts.split_holdout(prompts, 3, 0)
