"""`poweropd plan`: what it prints and writes, what it checks, and how it meets bad input."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from rich.console import Console
from tiny_models import CHATML, make_model, make_recipe
from typer.testing import CliRunner

from poweropd import Trainer
from poweropd.commands import app
from poweropd.config import Config
from poweropd.errors import UsageError
from poweropd.plan import command, table
from poweropd.plan.throughput import Measured
from poweropd.training.build import RunInputs

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "recipes" / "paper" / "qwen3-0.6b-from-4b.yaml"
SPEED = ["--tokens-per-second", "5000"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def numbers_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
    return line.removeprefix(f" {name}").split()


@pytest.mark.usefixtures("offline")
def test_it_prints_the_papers_flops_and_the_true_ones() -> None:
    text = printed(str(PAPER))
    assert numbers_of(text, "teacher, forward") == ["254.8", "280.4"]
    assert numbers_of(text, "student, forward  ") == ["30.6"]
    assert numbers_of(text, "without heads (the paper's sampled)") == ["346.6", "392.4"]
    assert numbers_of(text, "teacher's head") == ["25.5", "25.5"]
    assert numbers_of(text, "student's head") == ["30.6", "30.6"]
    assert numbers_of(text, "both heads") == ["56.1", "56.1"]
    assert numbers_of(text, "with both (the paper's full-vocabulary)") == ["402.7", "448.5"]
    assert numbers_of(text, "saved by leaving the heads out") == ["13.9%", "none"]
    assert "not checked" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.usefixtures("offline")
def test_json_holds_what_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    text = printed(str(PAPER), *SPEED, "--compare", "sampled,full_vocab", "--json", str(file))
    found = json.loads(file.read_text())
    sampled, full = found["estimates"]
    assert numbers_of(text, "full_vocab")[:2] == ["402.7", "448.5"]
    assert sampled["flops"]["true"]["total"] == full["flops"]["true"]["total"]
    assert sampled["seconds"]["rollout"] == pytest.approx(32 * 1024 / 5000)
    assert sampled["gpu_hours"] == pytest.approx(sampled["seconds"]["step"] * 1500 / 3600)
    held = sampled["memory_bytes"].values()
    assert max(held) < sampled["peak_bytes"] < sum(held)
    assert f"{sampled['peak_bytes'] / 2**30:.2f}" in text


@pytest.mark.usefixtures("offline")
def test_more_gpus_share_the_completions_and_cost_the_same_hours() -> None:
    config = Config.load(PAPER)
    one, four = (
        command.make_plan(config, command.Options(gpus=n, tokens_per_second=5000)).estimates[0]
        for n in (1, 4)
    )
    assert four.memory.peak < one.memory.peak
    assert four.step_seconds == pytest.approx(one.step_seconds / 4)
    assert four.gpu_hours(1500) == pytest.approx(one.gpu_hours(1500))


@pytest.mark.usefixtures("offline")
def test_where_no_number_of_gpus_is_enough_it_says_what_helps() -> None:
    text = printed(str(PAPER), "--gpu", "L4")
    assert "More GPUs do not help" in text
    assert "model.gradient_checkpointing=true: " in text


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu": "H1000"}, "--gpu: expected one of H100, .* got 'H1000'"),
        ({"compare": ["sampled", "dense"]}, "--compare: expected .* got 'dense'"),
        ({"measured": Path("nowhere")}, "--measured: expected a run directory"),
    ],
)
def test_wrong_options_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        command.make_plan(Config.load(PAPER), command.Options(**options))


@pytest.mark.usefixtures("offline")
def test_a_hub_model_that_is_not_built_in_needs_the_hub() -> None:
    with pytest.raises(UsageError, match="its geometry is not built in"):
        command.make_plan(Config.load(PAPER, ["model.student=some/model"]), command.Options())


def statuses(config: Config) -> dict[str, str]:
    found = command.make_plan(config, command.Options()).inspected
    return {check.name: check.status for check in found.checks}


def test_checks_of_local_models_and_prompts(recipe: Callable[..., Config]) -> None:
    # The tiny student ends a turn with another token than the tiny teacher.
    expected = dict.fromkeys(["vocabulary", "chat template", "prompts", "context"], "ok")
    assert statuses(recipe()) == expected | {"stop ids": "warning"}


@pytest.mark.parametrize(
    ("override", "failed"),
    [
        ({"data.prompts": "missing.jsonl"}, "prompts"),
        ({"rollout.max_new_tokens": 250}, "context"),
        ({"rollout.max_new_tokens": 256}, "context"),
    ],
)
def test_what_would_fail_in_training_fails_here(
    recipe: Callable[..., Config], override: dict, failed: str
) -> None:
    assert statuses(recipe(**override))[failed] == "failed"


@pytest.mark.parametrize("teacher_column", [None, "problem"])
def test_the_first_prompt_is_shown_as_a_run_shows_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, teacher_column: str | None
) -> None:
    other = CHATML.replace("<|im_start|>", "")
    student, teacher = make_model("qwen2", tmp_path / "s"), tmp_path / "t"
    make_model("qwen2", teacher, 1, template=other)
    config = make_recipe(student, teacher, tmp_path, **{"data.teacher_column": teacher_column})
    plan = command.make_plan(config, command.Options())
    lines = plan.inspected.first_prompt
    text = repr("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert lines[0] == f"the first prompt: {text}"
    own = [] if teacher_column is None else [text.replace("<|im_start|>", "")]
    assert lines[1:] == [f"the teacher's: {text}" for text in own]
    (check,) = [check for check in plan.inspected.checks if check.name == "chat template"]
    assert check.status == ("warning" if teacher_column is None else "ok")
    assert plan.to_dict()["first_prompt"] == lines
    console = Console(width=80, file=io.StringIO(), markup=False)
    table.print_plan(plan, console)
    assert "".join(lines).replace(" ", "") in "".join(console.file.getvalue().split())
    caplog.set_level("INFO", logger="poweropd")
    RunInputs.load(config)
    assert [m for m in caplog.messages if m in lines] == lines
    assert ("the teacher's chat template differs" in caplog.text) == (teacher_column is None)


def test_a_failed_check_is_exit_status_2(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "embedded.yaml"
    result = CliRunner().invoke(app, ["plan", str(recipe), "data.column=nothing"])
    assert isinstance(result.exception, UsageError)
    assert "prompts: " in str(result.exception)


def test_a_measured_run_gives_its_own_time_back(recipe: Callable[..., Config]) -> None:
    config = recipe()
    run_dir = Trainer(config, progress=False).train().run_dir
    measured = Measured.read(run_dir)
    own = command.make_plan(config, command.Options(measured=run_dir)).estimates[0]
    expected = measured.rollout + measured.busy + measured.sync
    assert own.step_seconds == pytest.approx(expected, rel=0.05)  # whole tokens
    longer = command.make_plan(
        recipe(**{"rollout.max_new_tokens": 24}),
        command.Options(measured=run_dir, completion_tokens=24),
    ).estimates[0]
    assert longer.step_seconds > own.step_seconds


def test_the_table_is_at_most_80_columns_wide_in_a_wide_terminal(
    recipe: Callable[..., Config],
) -> None:
    console = Console(width=200, file=io.StringIO())
    table.print_plan(command.make_plan(recipe(), command.Options()), console)
    assert max(map(len, console.file.getvalue().splitlines())) <= 80


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("override", "part", "ratio"),
    [
        ("train.sharding=fsdp2", "student weights", 1 / 4),
        ("train.sharding=fsdp2", "AdamW moments", 1 / 4),
        ("teacher.servers=[http://127.0.0.1:1]", "teacher weights", 0),
        ("teacher.quantization={quant_method: bitsandbytes, load_in_8bit: true}",
         "teacher weights", 0.55),
        ("rollout.engine=vllm_server", "KV cache", 0),
        ("rollout.engine=vllm", "vLLM", None),
    ],
)  # fmt: skip
def test_what_is_shared_or_elsewhere_takes_less(
    override: str, part: str, ratio: float | None
) -> None:
    def held(*overrides: str) -> dict[str, int]:
        plan = command.make_plan(Config.load(PAPER, list(overrides)), command.Options(gpus=4))
        return {p.name: p.bytes for p in plan.estimates[0].memory.parts}

    plain, other = held(), held(override)
    if ratio is None:
        assert other[part] == pytest.approx(0.3 * command.Options().gpu_bytes())
    else:
        assert other.get(part, 0) == pytest.approx(ratio * plain[part], rel=0.05)


@pytest.mark.usefixtures("offline")
def test_an_offloaded_teacher_is_held_for_scoring_alone() -> None:
    config = Config.load(PAPER, ["teacher.offload=true"])
    parts = command.make_plan(config, command.Options()).estimates[0].memory.parts
    assert [p.phases for p in parts if p.name == "teacher weights"] == [("score",)]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("kind", "lora", "copied"),
    [("base", True, False), ("base", False, True), ("live", False, False), ("ema", False, False)],
)
def test_a_student_that_is_its_own_teacher_has_no_second_model(
    kind: str, lora: bool, copied: bool
) -> None:
    adapter = ["model.lora={}"] if lora else []
    config = Config.load(PAPER, [f"teacher={{self: {kind}}}", *adapter])
    plan = command.make_plan(config, command.Options())
    parts = {part.name: part.bytes for part in plan.estimates[0].memory.parts}
    student = plan.inspected.models["student"].geometry.parameters
    assert plan.inspected.models["teacher"].name == config.model.student
    assert parts["teacher weights"] == (2 * student if copied else 0)
    assert parts.get("moving average", 0) == (4 * student if kind == "ema" else 0)


@pytest.mark.usefixtures("offline")
def test_epochs_that_cannot_be_counted_say_why(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "embedded.yaml"
    for overrides, why in [
        (["data.holdout=9000"], "data.holdout: expected fewer than the 8192 prompts"),
        (["model.student=Qwen/Qwen3-0.6B", "teacher.model=Qwen/Qwen3-4B"], "hub unreachable: Qwen"),
    ]:
        arguments = ["plan", str(recipe), "train.epochs=2", *overrides]
        result = CliRunner().invoke(app, arguments)
        assert str(result.exception).startswith(
            f"train.epochs: the prompts cannot be counted ({why}"
        )
