"""`poweropd init`: what it finds in files of every format, and the recipes that it writes."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tickets
from test_sources import FORMATS, as_jsonl, write
from tiny_models import make_byte_tokenizer, make_config

from poweropd import Config, Trainer, commands
from poweropd.errors import UsageError
from poweropd.plan.survey import survey

ROOT = Path(__file__).parent.parent
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}


def save_names(folder: Path, template: str | None = None, **fields: Any) -> Path:
    """Writes a tokenizer and a config, which are all that `init` reads of a model."""
    tokenizer = make_byte_tokenizer() if template is None else make_byte_tokenizer(template)
    tokenizer.save_pretrained(folder)
    make_config("qwen3", len(tokenizer), **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_names(tmp_path_factory.mktemp("models") / "tiny")


def init(arguments: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["poweropd", "init", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    return int(stopped.value.code or 0)


# Looking at files.


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_looked_at(tmp_path: Path, name: str, ending: str) -> None:
    rows = [{"id": str(i), "ticket": f"My kettle no. {i} broke.", "class": "ab"[i % 2]}
            for i in range(7)]  # fmt: skip
    found = survey(write(tmp_path / f"a.{name}{ending}", FORMATS[name](rows)), "train")
    assert (found.count, found.column, found.guessed) == (7, "ticket", True)
    assert (found.answer, found.grader) == ("class", "choice")
    assert found.prompts[6].text == "My kettle no. 6 broke."


def test_a_folder_of_shards_and_messages_of_every_form(tmp_path: Path) -> None:
    write(tmp_path / "shards/train-0.jsonl", as_jsonl([{"prompt": [USER, ANSWER]}]))
    write(tmp_path / "shards/train-1.jsonl", as_jsonl([{"prompt": [USER, ANSWER, USER]}] * 2))
    write(tmp_path / "shards/test-0.jsonl", as_jsonl([{"prompt": "not looked at"}]))
    found = survey(str(tmp_path / "shards"), "train")
    assert (found.count, found.column, found.guessed) == (3, "prompt", False)
    assert [len(prompt.turns) for prompt in found.prompts] == [1, 3, 3]  # the last answer is cut
    verl = [{"prompt": [USER], "reward_model": {"ground_truth": "4"}}] * 2
    found = survey(write(tmp_path / "verl.parquet", FORMATS["parquet"](verl)), "train")
    assert (found.answer, found.grader) == ("reward_model.ground_truth", "math")


LONG = "A long reference answer, which no grader could compare with a completion of a student."


@pytest.mark.parametrize(
    ("column", "golds", "grader"),
    [
        ("answer", ["A", "b", "C"], "choice"),
        ("answer", [{"a": 1}, {"a": 2}, {}], "json"),
        ("answer", ['{"a": 1}', "{}", "{}"], "json"),
        ("answer", [4, "\\frac{1}{2}", "so it is 3\n#### 3"], "math"),
        ("label", ["refund", "repair", "refund", "repair", "refund", "repair"], "exact"),
        ("answer", [LONG, LONG, LONG], None),
        ("answer", ["A", None, "B"], None),
        ("something", ["A", "B", "C"], None),
    ],
)
def test_gold_answers_are_found_with_the_grader_that_suits_them(
    tmp_path: Path, column: str, golds: list[object], grader: str | None
) -> None:
    rows = [{"question": "Which?", column: gold} for gold in golds]
    found = survey(write(tmp_path / "a.jsonl", as_jsonl(rows)), "train")
    assert (found.answer, found.grader) == (column if grader else None, grader)


def test_columns_may_be_named(tmp_path: Path) -> None:
    rows = [{"prompt": "?", "own": f"Text {i}", "city": f"Town {i}"} for i in range(9)]
    found = survey(write(tmp_path / "a.jsonl", as_jsonl(rows)), "train", "own", "city")
    assert (found.column, found.guessed, found.answer) == ("own", False, "city")
    assert found.grader == "exact"
    long = write(tmp_path / "b.jsonl", as_jsonl([{"prompt": "?", "own": LONG}]))
    with pytest.raises(UsageError, match=r"b\.jsonl:1: column 'own': expected short answers, got"):
        survey(long, "train", answer="own")


# Recipes.


def test_the_recipe_of_the_page_is_the_one_that_init_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """recipes/own-task.yaml differs from it in the models, and in nothing else."""
    monkeypatch.chdir(tmp_path)
    rows = [{"ticket": t.text, "category": t.category} for t in tickets.tickets(300, seed=7)]
    write(Path("train.jsonl"), as_jsonl(rows[:200]))
    write(Path("test.jsonl"), as_jsonl(rows[200:]))
    tokenizer = tickets.make_tokenizer()
    for name in tickets.SCHOOLS:
        tokenizer.save_pretrained(name)
        tickets.make_config(name, tokenizer).save_pretrained(name)
    models = ["--teacher", "teacher", "--student", "student"]
    rest = ["--system", tickets.SYSTEM, "--out", "own-task.yaml"]
    assert init(["train.jsonl", "--test", "test.jsonl", *models, *rest], monkeypatch) == 0
    shipped = (ROOT / "recipes" / "own-task.yaml").read_text()
    written = Path("own-task.yaml").read_text().replace(" teacher into student ", " T into S ")
    written = written.replace("model: teacher", "model: T").replace(
        "student: student", "student: S"
    )
    assert shipped.replace("Qwen/Qwen3-0.6B", "S").replace("Qwen/Qwen3-4B", "T") == written


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    asked = [{"role": "user", "content": f"{i}+0?"} for i in range(12)]
    lines = [{"messages": [turn, ANSWER], "gold": str(i)} for i, turn in enumerate(asked)]
    return Path(write(tmp_path / "rows.jsonl", as_jsonl(lines)))


def test_its_recipe_trains(
    rows: Path,
    student_dir: Path,
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "mine.yaml"
    models = ["--teacher", teacher_dir, "--student", student_dir]
    assert init([rows, *models, "--test", rows, "--out", out], monkeypatch) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{rows}: 12 prompts in 'messages', gold answers in 'gold'"
    assert said[1] == f"{rows}: 12 problems, graded by math"
    small = {"run.dir": tmp_path / "run", "train.steps": 1, "train.prompts_per_step": 2}
    small |= {"rollout.max_new_tokens": 4, "evaluate.max_new_tokens": 4}
    config = Config.load(out, [f"{key}={value}" for key, value in small.items()])
    assert (config.data.column, config.data.holdout) == ("messages", 2)
    assert Trainer(config, progress=False).train().steps == 1
    for name in ("step-0", "step-1"):
        found = json.loads((tmp_path / "run/eval" / name / "results.json").read_text())
        assert list(found["results"]) == ["rows"]
        assert found["divergence"]["reverse_kl"]["mean"] > 0


def test_a_recipe_says_what_is_special_about_models_and_prompts(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = write(tmp_path / "a.jsonl", as_jsonl([{"text": 70 * "long"}, {"text": "short"}] * 3000))
    plain = save_names(tmp_path / "plain", template="")
    served = ["--teacher", "Qwen/Qwen3-4B", "--teacher-server", "http://localhost:1"]
    out = tmp_path / "recipe.yaml"
    assert init([long, *served, "--student", plain, "--out", out], monkeypatch) == 0
    config = Config.load(out)
    assert config.data.filter_longer
    assert config.data.chat is None
    assert config.only_teacher.servers == ["http://localhost:1"]
    assert (config.train.steps, config.train.prompts_per_step) == (500, 32)
    assert (config.data.holdout, config.rollout.max_new_tokens) == (200, 32)
    assert "column: text              # guessed" in out.read_text()


BAD: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "no rows": ([], [], "rows.jsonl: expected at least one row, got none"),
    "one row": ([{"prompt": "?"}], [], "rows.jsonl: expected at least 2 prompts, one to train on"),
    "no text": ([{"n": 1}], [], "its columns are n: name it with --column"),
    "column": ([{"prompt": "?"}], ["--column", "x"], "in column 'x', its columns are prompt"),
    "answer": (
        [{"prompt": "?"}],
        ["--answer", "x"],
        "rows.jsonl:1: expected a gold answer in column 'x', its columns are prompt",
    ),
    "image": (
        [{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}],
        [],
        "message 1: expected parts of type text as content, got 'image'",
    ),
    "role": ([{"prompt": [{"role": "bot", "content": "?"}]}], [], "message 1: expected a role of"),
    "no user": (
        [{"prompt": [{"role": "system", "content": "?"}]}],
        [],
        "rows.jsonl:1: expected a message of the user in column 'prompt', got system",
    ),
    "test": ([{"prompt": "?"}], ["--test", "no.jsonl"], "--test: no.jsonl: no such file or folder"),
    "no golds": (
        [{"prompt": "?", "x": 1}],
        ["--test", "rows.jsonl"],
        "--test: rows.jsonl: no column of gold answers was found, its columns are prompt, x",
    ),
    "student": ([{"prompt": "?"}], ["--student", "./no"], "--student: ./no: no such model"),
    "server": ([{"prompt": "?"}], ["--teacher-server", "x"], "--teacher-server: expected a base U"),
    "out": ([{"prompt": "?"}], ["--out", "rows.jsonl"], "rows.jsonl: it exists already: name"),
    "system": (
        [{"prompt": "?"}] * 2,
        ["--student", "plain", "--teacher", "plain", "--system", "Hi."],
        "a system turn needs the chat template",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_recipe_is_one_line_and_writes_nothing(
    name: str,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, options, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    write(Path("rows.jsonl"), as_jsonl(rows))
    if "plain" in options:
        save_names(Path("plain"), template="")
    models = ["--teacher", model, "--student", model]
    assert init(["rows.jsonl", *models, *options], monkeypatch) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not Path("recipe.yaml").exists()


def test_models_of_different_vocabularies_are_refused(
    rows: Path,
    model: Path,
    student_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert init([rows, "--teacher", student_dir, "--student", model], monkeypatch) == 2
    assert "student and teacher must share one vocabulary" in capsys.readouterr().err
