"""What the teacher alone reads: templates, messages, functions, a system turn, feedback."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poweropd import Config, Trainer
from poweropd.config.data import DataConfig
from poweropd.data.prompts import Prompt, load_prompts
from poweropd.data.rollout import make_example
from poweropd.errors import RunError, UsageError
from poweropd.models.loading import load_tokenizer

TOKENIZER = load_tokenizer("embedded:student")
ROW = {"problem": "1+2", "work": "1+2=3", "answer": 3, "meta": {"hint": "add {x}"}, "empty": None}
BEGIN, END = "<|im_start|>", "<|im_end|>\n"
USER = f"{BEGIN}user\n{{}}{END}{BEGIN}assistant\n"
Recipe = Callable[..., Config]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., str]:
    """Reads one row; returns what the teacher reads of it."""

    def make(**data: Any) -> str:
        return TOKENIZER.decode(first(tmp_path, **data).teacher_prompt_ids)

    return make


def first(folder: Path, row: dict[str, Any] = ROW, **data: Any) -> Prompt:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    section = DataConfig(prompts=str(path), **data)
    return load_prompts(section, TOKENIZER, {"": TOKENIZER})[0]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{problem}\n{work}", "1+2\n1+2=3"),
        ("{answer}: {meta.hint}", "3: add {x}"),
        ("{{{problem}}} {{}}", "{1+2} {}"),
        ("no column", "no column"),
    ],
)
def test_a_template_is_one_user_turn(read: Callable[..., str], template: str, text: str) -> None:
    assert read(teacher_prompt=template) == USER.format(text)


def test_messages_are_templates_and_a_last_one_of_the_assistant_is_gone_on_with(
    read: Callable[..., str],
) -> None:
    turns = [
        {"role": "system", "content": "add"},
        {"role": "user", "content": "{problem}"},
        {"role": "assistant", "content": "{work}\n"},
    ]
    system = f"{BEGIN}system\nadd{END}"
    begun = system + USER.format("1+2") + "1+2=3\n"
    assert read(teacher_prompt=turns) == begun
    assert read(teacher_prompt=turns[:2]) == system + USER.format("1+2")


def test_the_teachers_system_turn_replaces_any_other(tmp_path: Path) -> None:
    found = first(tmp_path, system="you add", teacher_system="you know {all}")
    own = USER.format("1+2")
    assert TOKENIZER.decode(found.prompt_ids) == f"{BEGIN}system\nyou add{END}{own}"
    expected = f"{BEGIN}system\nyou know {{all}}{END}{own}"
    assert TOKENIZER.decode(found.teacher_prompt_ids) == expected
    both = first(tmp_path, teacher_system="s", teacher_prompt="{work}")
    expected = f"{BEGIN}system\ns{END}{USER.format('1+2=3')}"
    assert TOKENIZER.decode(both.teacher_prompt_ids) == expected


def hinted(row: dict[str, Any]) -> object:
    return {"text": f"{row['problem']}!", "turns": [{"role": "user", "content": "hi"}]}[row["form"]]


def raising(row: dict[str, Any]) -> str:
    raise KeyError("hint")


def numbering(row: dict[str, Any]) -> int:
    return 3


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])


@pytest.mark.usefixtures("importable")
def test_a_function_of_the_row_makes_text_or_messages(tmp_path: Path) -> None:
    for form, text in (("text", "1+2!"), ("turns", "hi")):
        found = first(tmp_path, {**ROW, "form": form}, teacher_prompt="own:hinted")
        assert TOKENIZER.decode(found.teacher_prompt_ids) == USER.format(text)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"teacher_prompt": "{solution}"}, r"rows\.jsonl:1: .*column 'solution', the columns are"),
        ({"teacher_prompt": "{empty}"}, r"rows\.jsonl:1: .*text or a number in column 'empty'"),
        ({"teacher_prompt": "a } b"}, r"data\.teacher_prompt: expected the names of columns"),
        ({"teacher_prompt": "\\boxed{}"}, r"data\.teacher_prompt: .*\{\{ and \}\}"),
        ({"teacher_prompt": "{answer:.2f}"}, r"data\.teacher_prompt: expected the names"),
        (
            {"teacher_prompt": [{"role": "user", "content": "{"}]},
            r"data\.teacher_prompt\.0\.content: expected the names",
        ),
        ({"teacher_prompt": [{"role": "system", "content": "x"}]}, r"a message of the user"),
        ({"teacher_prompt": "own:raising"}, r"rows\.jsonl:1: .*own:raising: it raised KeyError"),
        ({"teacher_prompt": "own:numbering"}, r"expected text or chat messages, got 3"),
        ({"teacher_prompt": "own:absent"}, r"data\.teacher_prompt: module own has no 'absent'"),
        ({"teacher_prompt": "x", "chat": None, "teacher_system": "y"}, r"need the chat template"),
    ],
)
def test_a_prompt_that_cannot_be_made_is_refused_in_one_line(
    read: Callable[..., str], data: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(**data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"teacher_prompt": "x", "teacher_column": "y"}, r"data\.teacher_prompt: .*got both"),
        ({"feedback": {"grader": "math"}}, r"data\.feedback: it needs data\.teacher_prompt"),
        (
            {"teacher_prompt": "x", "feedback": {"grader": "maths"}},
            r"data\.feedback\.grader: expected one of",
        ),
    ],
)
def test_keys_that_cannot_go_together_are_refused(
    recipe: Recipe, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(data={"prompts": "embedded:train", **data})


# Feedback on the student's own completion.

TOLD = "{problem} {completion} {grade} {feedback}"


@pytest.fixture
def informed(recipe: Recipe, tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a trainer whose teacher is told of the student's completions."""

    def make(grader: str = "math", **overrides: Any) -> Trainer:
        path = tmp_path / "graded.jsonl"
        rows = [{"problem": f"{i}+1", "gold": str(i + 1)} for i in range(8)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        feedback = {"grader": grader, "answer_column": "gold"}
        data = {"prompts": str(path), "teacher_prompt": TOLD, "feedback": feedback}
        own = {"teacher": {"self": "base"}, "data": data, "train.steps": 2}
        return Trainer(recipe(**own | overrides), progress=False)

    return make


def test_the_teacher_is_told_the_completion_and_its_grade(
    informed: Callable[..., Trainer],
) -> None:
    trainer = informed()
    request = trainer.requests(0)[0]
    problem, gold = (request.prompt.row[name] for name in ("problem", "gold"))
    for text, said in (
        (f"\\boxed{{{gold}}}", f"{problem} \\boxed{{{gold}}} 1 the answer equals the gold answer"),
        ("so", f"{problem} so 0 the completion states no answer, or its last box is empty"),
    ):
        ids = trainer.inputs.tokenizer(text, add_special_tokens=False)["input_ids"]
        (example,) = trainer.scored([request.rollout(ids, [], stopped=False)])
        read = trainer.inputs.tokenizer.decode(example.prompt.teacher_prompt_ids)
        assert read == USER.format(said)
        assert example.rollout.completion_ids == ids
        assert example.teacher_log_probs is not None


def test_a_completion_without_room_for_its_feedback_is_left_out_and_counted(
    informed: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = informed()
    profile = trainer.inputs.teachers[""]
    longest = len(trainer.inputs.prompts[0].teacher_prompt_ids)
    room = {"": type(profile)(profile.tokenizer, profile.stop_ids, longest + 70, None)}
    assert trainer.feedback is not None
    trainer.feedback.teachers = room
    trainer.train()
    rows = trainer.run.metrics()
    assert all(0 < row["feedback/left_out_fraction"] <= 1 for row in rows)
    assert caplog.text.count("have no room in the teacher's context") == 1


@pytest.mark.thorough
def test_a_run_with_feedback_goes_on_as_it_was(
    informed: Callable[..., Trainer], tmp_path: Path
) -> None:
    whole = informed(**{"run.dir": str(tmp_path / "whole")})
    whole.train()
    informed(**{"run.dir": str(tmp_path / "parts")}).train(until=1)
    parts = informed(**{"run.dir": str(tmp_path / "parts")})
    parts.train()
    keys = ("loss", "feedback/mean_grade", "reverse_kl")
    found = [[row[key] for key in keys] for row in parts.run.metrics()]
    assert found == [[row[key] for key in keys] for row in whole.run.metrics()]


def test_held_out_completions_are_judged_with_their_feedback(
    informed: Callable[..., Trainer],
) -> None:
    trainer = informed(evaluate={"every": 2, "before": False}, **{"data.holdout": 2})
    assert trainer.judges is not None
    rollout = trainer.requests(0)[0].rollout([24, 25], [], stopped=False)
    example = make_example(rollout, (), (0,), "raw")
    assert example is not None
    (told,) = trainer.judges.informed([example])
    read = trainer.inputs.tokenizer.decode(told.prompt.teacher_prompt_ids)
    assert f"{rollout.request.prompt.row['problem']} 01 0 the" in read
    trainer.train()
    assert trainer.run.divergence(2)["reverse_kl"]["mean"] >= 0


def grading(row: dict[str, Any], completion: str) -> float:
    raise ValueError("no oracle")


@pytest.mark.usefixtures("importable")
def test_a_grader_that_fails_ends_the_run_in_one_line(informed: Callable[..., Trainer]) -> None:
    with pytest.raises(RunError, match=r"data\.feedback\.grader own:grading: it raised ValueError"):
        informed("own:grading").train()
