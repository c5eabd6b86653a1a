"""Loading benchmarks from files, from (local copies of) Hub datasets, and the embedded task."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_sources import as_csv, as_parquet, write
from tiny_models import make_byte_tokenizer

from poweropd.errors import UsageError
from poweropd.evaluation import benchmarks
from poweropd.evaluation.benchmarks import BENCHMARKS, Problem
from poweropd.evaluation.runner import prompt_ids
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.grading.rules import Rule

HUB_ROWS: dict[str, tuple[dict[str, Any], Problem]] = {
    "gsm8k": (
        {"question": "Two bags of 1,000?", "answer": "2*1,000=<<2*1000=2000>>2,000\n#### 2,000"},
        Problem("0", "Two bags of 1,000?", "2,000"),
    ),
    "math500": (
        {"problem": "Half of 3?", "answer": "\\frac{3}{2}", "unique_id": "test/x/1.json"},
        Problem("test/x/1.json", "Half of 3?", "\\frac{3}{2}"),
    ),
    "amc23": (
        {"id": 4, "question": "Three nines?", "answer": 27.0, "url": ""},
        Problem("4", "Three nines?", "27.0"),
    ),
    "aime24": (
        {"id": 60, "problem": "Five squared?", "answer": "025"},
        Problem("60", "Five squared?", "025"),
    ),
    "aime25": (
        {"id": "7", "problem": "A turn less 24 degrees?", "answer": "336^\\circ"},
        Problem("7", "A turn less 24 degrees?", "336^\\circ"),
    ),
    "minerva": (
        {"question": "How far?", "answer": "We find $d = \\boxed{1.5e8}$ km."},
        Problem("0", "How far?", "1.5e8", Rule(relative_tolerance=1e-2)),
    ),
    "olympiadbench": (
        {"id": 2592, "question": "Which?", "final_answer": ["$3$", "$-3$"]},
        Problem("2592", "Which?", "$3$, $-3$", Rule(absolute_tolerance=0.1)),
    ),
}


def write_rows(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where owner/name directories stand for Hub datasets, as `datasets` allows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def publish(hub: Path, dataset: str, config: str, split: str, *rows: object) -> None:
    write_rows(hub / dataset / "rows.jsonl", *rows)
    card = f"""---
configs:
- config_name: {config}
  data_files:
  - split: {split}
    path: rows.jsonl
---
"""
    (hub / dataset / "README.md").write_text(card)


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_of_the_hub_become_problems(name: str, hub: Path) -> None:
    row, problem = HUB_ROWS[name]
    benchmark = BENCHMARKS[name]
    assert benchmark.dataset is not None
    publish(hub, benchmark.dataset, benchmark.config or "default", benchmark.split, row)
    assert benchmarks.load_benchmark(name) == [problem]


def test_every_benchmark_is_in_the_table() -> None:
    assert set(BENCHMARKS) == {*HUB_ROWS, "embedded"}


def test_local_files_replace_the_hub(tmp_path: Path) -> None:
    rows = [{"id": f"q{i}", "problem": f"{i} + 1?", "answer": f"{i + 1}"} for i in range(5)]
    write_rows(tmp_path / "minerva.jsonl", *rows)
    loaded = benchmarks.load_benchmark("minerva", data_dir=tmp_path, limit=2)
    rule = Rule(relative_tolerance=1e-2)
    assert loaded == [Problem("q0", "0 + 1?", "1", rule), Problem("q1", "1 + 1?", "2", rule)]


def test_stated_tolerances_are_found_under_either_id(tmp_path: Path) -> None:
    row = {"id": "olympiadbench-2592", "problem": "Which?", "answer": "3"}
    write_rows(tmp_path / "olympiadbench.jsonl", row, row | {"id": "olympiadbench-2593"})
    first, second = benchmarks.load_benchmark("olympiadbench", data_dir=tmp_path)
    assert (first.rule.absolute_tolerance, second.rule.absolute_tolerance) == (0.1, 0.0)


def test_one_of_your_own_in_the_data_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", {"id": 1, "problem": "1 + 1?", "answer": 2})
    assert benchmarks.load_benchmark("mine", data_dir=tmp_path) == [Problem("1", "1 + 1?", "2")]


def test_any_file_with_named_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "own.jsonl", {"q": "7 * 6?", "a": "42"}, {"q": "8?", "a": 8.5})
    loaded = benchmarks.load_benchmark(path, problem_column="q", answer_column="a")
    assert loaded == [Problem("0", "7 * 6?", "42"), Problem("1", "8?", "8.5")]


VERL = {
    "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "7 + 6?"}],
    "reward_model": {"style": "rule", "ground_truth": "13"},
}
COLUMNS = {"problem_column": "prompt", "answer_column": "reward_model.ground_truth"}


def test_files_of_every_format_with_messages_and_nested_columns(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", as_parquet([VERL]))
    write(tmp_path / "train.parquet", as_parquet([VERL, VERL]))
    (problem,) = benchmarks.load_benchmark(tmp_path / "test.parquet", **COLUMNS)
    assert (problem.problem, problem.answer) == ("7 + 6?", "13")
    assert problem.conversation is not None
    assert problem.conversation.turns == VERL["prompt"]
    assert len(benchmarks.load_benchmark(tmp_path, **COLUMNS)) == 1  # a folder's test split
    assert len(benchmarks.load_benchmark(tmp_path, **COLUMNS, split="train")) == 2
    sums = as_csv([{"problem": "1 + 1?", "answer": 2}])
    (problem,) = benchmarks.load_benchmark(write(tmp_path / "sums.csv.gz", sums))
    assert (problem.problem, problem.answer) == ("1 + 1?", "2")


def test_an_instruction_follows_the_last_message_of_the_user(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer()
    problems = benchmarks.load_benchmark(
        write(tmp_path / "a.parquet", as_parquet([VERL])), **COLUMNS
    )
    settings = EvaluationSettings(instruction="Briefly.")
    (ids,) = prompt_ids(problems, settings, tokenizer)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n7 + 6?\nBriefly.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_any_dataset_with_named_columns(hub: Path) -> None:
    publish(hub, "someone/sums", "small", "dev", {"q": "7 + 6?", "a": "It is \\boxed{13}."})
    loaded = benchmarks.load_benchmark(
        "someone/sums", problem_column="q", answer_column="a", config="small", split="dev"
    )
    assert loaded == [Problem("0", "7 + 6?", "13")]


def test_the_embedded_task() -> None:
    loaded = benchmarks.load_benchmark("embedded", limit=3)
    assert len(loaded) == 3
    assert loaded == benchmarks.load_benchmark("embedded", limit=5)[:3]
    assert sum(map(int, loaded[0].problem.split("+"))) == int(loaded[0].answer)
    assert len(benchmarks.load_benchmark("embedded")) == benchmarks.EMBEDDED_PROBLEMS


GOOD = '{"id": "a", "problem": "1?", "answer": "1"}'


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"id": "b", "problem": "2?"}', ":2: expected a field 'answer', got id, problem"),
        ('{"id": "b", "problem": "", "answer": "2"}', ":2: expected text in 'problem'"),
        ('{"id": "b", "problem": "2?", "answer": null}', ":2: expected text in 'answer'"),
        (GOOD, ":2: expected ids that differ, got 'a' again"),
        ('{"id": "b", "problem', ":2: expected one JSON object per line"),
        ("[1, 2]", ":2: expected a JSON object, got list"),
    ],
)
def test_broken_files_name_the_line(second: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(f"{GOOD}\n{second}\n")
    with pytest.raises(UsageError, match=r"gsm8k\.jsonl") as caught:
        benchmarks.load_benchmark("gsm8k", data_dir=tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gsm8"}, "unknown benchmark 'gsm8': expected one of gsm8k, math500, "),
        ({"name": "gsm8k", "limit": 0}, "a limit of at least 1 problem, got 0"),
        ({"name": "gsm8k", "data_dir": "nowhere"}, "nowhere/gsm8k.jsonl: cannot read it"),
        ({"name": "none.jsonl"}, "none.jsonl: cannot read it"),
        ({"name": "empty.jsonl"}, "empty.jsonl: expected at least one problem, got none"),
    ],
)
def test_what_cannot_be_loaded(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError) as caught:
        benchmarks.load_benchmark(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
