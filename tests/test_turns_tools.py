"""The user's tools: whatever one does, its call has an answer in time; what is refused before."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tool_users
from own_tools import DEEDS
from tiny_models import TURN_END, make_model
from turn_cases import TOKENIZER, TOOLS, Scripted, call

from poweropd import Config, Trainer
from poweropd.errors import UsageError
from poweropd.models.language_model import Student
from poweropd.rollouts.turns.calls import ToolCall
from poweropd.rollouts.turns.tools import Toolbox, tool_schemas

LIMIT = 40
ROOM = {"max_position_embeddings": 2048}
#: What a tool does -> what the student reads.
ANSWERS = {
    "hang": "error: no answer within 0.5 s",
    "raise": "error: LookupError: no such thing",
    "raise unprintable": "error: Unprintable: odd",
    "print": "printed",
    "return 10 MB": "z" * LIMIT + "... (10485760 characters)",
    "end": "error: ProcessExpired: Abnormal termination"[:LIMIT] + "... (43 characters)",
    "exit": "error: SystemExit: 4",
    "recurse": "error: RecursionError: maximum recursion"[:LIMIT],
    "take memory": "error: MemoryError:",
    "return a mapping": '{"sum": 3, "é": [1.5, null]}',
    "return nothing": "null",
    "return an object": '"<object object at 0x',
    "return half a character": "a?b",
}


@pytest.fixture(scope="module")
def toolbox() -> Iterator[Toolbox]:
    names = ["own_tools:misbehave", "own_tools:calculate"]
    made = Toolbox(names, timeout=0.5, workers=2, max_chars=LIMIT)
    made.check()
    yield made
    made.close()


def test_every_bad_tool_has_its_answer() -> None:
    assert set(ANSWERS) == set(DEEDS)


@pytest.mark.parametrize("how", DEEDS)
def test_a_bad_tool_is_answered_for_and_the_next_call_goes_on(
    toolbox: Toolbox, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = toolbox.submit(ToolCall("misbehave", {"how": how})).result()
    assert answer.startswith(ANSWERS[how])
    assert len(answer) <= LIMIT + 30
    sum = toolbox.submit(ToolCall("calculate", {"expression": "20+2*11"}))
    assert sum.result() == "42"
    assert capfd.readouterr() == ("", "")


def test_calls_run_side_by_side_and_a_hanging_one_is_killed(toolbox: Toolbox) -> None:
    start = time.monotonic()
    hanging = [toolbox.submit(ToolCall("misbehave", {"how": "hang"})) for _ in range(2)]
    assert {one.result() for one in hanging} == {ANSWERS["hang"]}
    assert time.monotonic() - start >= 0.5


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (ToolCall("calculate"), "error: TypeError: calculate() missing 1 "),
        (ToolCall("calculate", {"x": 1}), "error: TypeError: calculate() got an une"),
        (ToolCall("compute"), "error: there is no tool 'compute', only "),
        (ToolCall(problem="expected a call"), "error: expected a call"),
    ],
)
def test_a_wrong_call_is_told(toolbox: Toolbox, asked: ToolCall, answer: str) -> None:
    assert toolbox.submit(asked).result().startswith(answer)


def test_a_schema_is_that_of_hints_and_docstring() -> None:
    (schema,) = tool_schemas(["own_tools:calculate"]) or []
    function = schema["function"]
    assert function["name"] == "calculate"
    assert function["parameters"]["properties"]["expression"]["type"] == "string"
    assert tool_schemas([]) is None


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["own_tools:nothing"], "rollout.tools: module own_tools has no 'nothing'"),
        (["no_such_module:f"], "rollout.tools: cannot import no_such_module:f: ModuleNotFound"),
        (["own_tools:DEEDS"], "rollout.tools: expected a function, got own_tools:DEEDS, which is"),
        (["own_tools:calculate"] * 2, "rollout.tools: two functions are called calculate"),
        (["own_tools:undocumented"], "rollout.tools: own_tools:undocumented: expected a function"),
    ],
)
def test_what_is_no_tool_is_refused(names: list[str], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        tool_schemas(names)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


# In a recipe.


def test_tools_run_in_so_many_processes(recipe: Callable[..., Config], tmp_path: Path) -> None:
    settings = {"tools": "own_tools:meet", "tool_workers": 3, "tool_timeout": 60.0}
    toolbox = Toolbox.of(recipe(rollout=settings).rollout)
    place = tmp_path / "place"
    place.mkdir()
    meeting = ToolCall("meet", {"folder": str(place), "count": 3})
    assert [one.result() for one in [toolbox.submit(meeting) for _ in range(3)]] == ["met"] * 3


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"rollout": {"tools": "a:b", "environment": "a:c"}},
            "rollout.tools: it cannot go with rollout.environment",
        ),
        (
            {"rollout": {"tools": "a:b"}, "data.chat": None},
            "rollout.tools: it needs the chat template, so not data.chat=null",
        ),
        (
            {"rollout": {"environment": "a:b"}, "data.continue_assistant": True},
            "rollout.environment: it cannot go with data.continue_assistant",
        ),
        (
            {"rollout": {"task_reward": {"name": "environment"}}},
            "rollout.task_reward.name: environment needs rollout.environment",
        ),
        (
            {"rollout": {"environment": "a:b"}, "teacher.align": "spans"},
            "rollout.environment: it cannot go with teacher.align=spans",
        ),
        ({"rollout": {"tools": "calculate"}}, "rollout.tools"),
    ],
)
def test_what_cannot_go_together_is_refused(
    recipe: Callable[..., Config], settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        recipe(**settings)


def test_a_template_without_tools_is_refused_before_any_weight_is_loaded(
    recipe: Callable[..., Config],
) -> None:
    with pytest.raises(UsageError, match="its chat template leaves out the tool 'calculate'"):
        Trainer(recipe(rollout={"tools": "own_tools:calculate"}), progress=False)


@pytest.mark.slow
def test_a_student_that_calls_by_itself_learns_to_call_well(tmp_path: Path) -> None:
    """It was taught to guess, and to leave a number out of its call."""
    models = {
        name: str(tool_users.make(name, tmp_path / name, steps, batch_size=32))
        for name, steps in {"teacher": 300, "student": 250}.items()
    }
    config = Config.from_dict(
        {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"student": models["student"], "dtype": "float32"},
            "teacher": {"model": models["teacher"], "dtype": "float32"},
            "data": {"prompts": "embedded:train"},
            "rollout": {"tools": tool_users.TOOL, "max_turns": 3, "max_new_tokens": 128},
            "train": {"steps": 30, "prompts_per_step": 8, "learning_rate": 1e-3},
            "evaluate": {
                "every": 30, "benchmarks": ["embedded"], "limit": 64, "max_new_tokens": 128,
            },
        }
    )  # fmt: skip
    trainer = Trainer(config, progress=False)
    trainer.train()
    right = [trainer.run.evaluation(step)["embedded"]["avg_at_k"]["mean"] for step in (0, 30)]
    assert right[1] > right[0] + 0.3
    rows = trainer.run.metrics()
    calls = [row["completions/mean_tool_calls"] for row in rows]
    assert sum(calls[:2]) < sum(calls[-2:])  # fewer guesses
    assert all(row["num_tokens"] < row["completions/mean_length"] * 8 for row in rows)


def calls_a_tool(student: Student, config: Config, tokenizer: Any) -> Scripted:
    """An engine of the user's whose student calculates, then misbehaves, then answers."""

    def turns(text: str) -> str:
        said = text.count("<|im_start|>tool")
        calls = [call("calculate", expression="1+2"), call("misbehave", how="hang"), "Three."]
        return calls[said]

    return Scripted(turns)


@pytest.mark.thorough
def test_a_training_with_tools_loses_nothing_and_tells_of_errors(tmp_path: Path) -> None:
    models = {
        name: str(make_model("qwen3", tmp_path / name, seed=seed, template=TOOLS, **ROOM))
        for seed, name in enumerate(("student", "teacher"))
    }
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"problem": "1+2?", "answer": "3"}, {"problem": "2+1?", "answer": "3"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.from_dict(
        {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"student": models["student"], "dtype": "float32"},
            "teacher": {"model": models["teacher"], "dtype": "float32"},
            "data": {"prompts": str(prompts)},
            "rollout": {
                "engine": "test_turns_tools:calls_a_tool",
                "tools": ["own_tools:calculate", "own_tools:misbehave"],
                "tool_timeout": 0.5,
                "tool_workers": 1,
                "tool_max_chars": 20,
                "max_turns": 3,
                "max_new_tokens": 400,
                "task_reward": {"name": "test_turns_tools:written"},
            },
            "train": {"steps": 1, "prompts_per_step": 2, "learning_rate": 1e-3},
            "evaluate": {
                "benchmarks": [{"name": "own", "file": str(prompts)}],
                "n": 1, "max_new_tokens": 400,
            },
        }
    )  # fmt: skip
    trainer = Trainer(config, progress=False)
    trainer.train()
    (row,) = trainer.run.metrics()
    assert row["completions/mean_turns"] == 3
    assert row["completions/mean_tool_calls"] == 2
    assert row["completions/tool_error_fraction"] == 0.5
    assert row["num_tokens"] == 2 * (len(WRITTEN) - 1)
    assert row["completions/truncated_fraction"] == 0
    assert row["eval/own/mean_length"] > row["num_tokens"] / 2  # tools answered there, too
    assert row["task_reward/mean"] == 1.0
    shown = TOKENIZER.decode(trainer.inputs.prompts[0].prompt_ids)
    assert '"name": "calculate"' in shown
    assert trainer.inputs.prompts[0].teacher_prompt_ids == trainer.inputs.prompts[0].prompt_ids


#: The tokens that the student of `calls_a_tool` writes.
WRITTEN = [
    *TOKENIZER(call("calculate", expression="1+2"))["input_ids"], TURN_END,
    *TOKENIZER(call("misbehave", how="hang"))["input_ids"], TURN_END,
    *TOKENIZER("Three.")["input_ids"], TURN_END,
]  # fmt: skip


def written(row: dict[str, Any], completion: str) -> float:
    """A task reward that is 1 for what the student wrote, without the tools' answers."""
    return float(completion == TOKENIZER.decode(WRITTEN, skip_special_tokens=True))
