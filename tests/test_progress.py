"""What training, evaluations and sweeps say while they go on, and what a run says at its end."""

import io
import json
import logging
import shlex
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from poweropd import Config, Trainer, commands
from poweropd.errors import RunError
from poweropd.runs import summary
from poweropd.runs.directory import RunDirectory
from poweropd.runs.pace import LONGEST_SECONDS, Pace, WorkProgress
from poweropd.sweep.jobs import Training
from poweropd.sweep.progress import SweepProgress
from poweropd.terminal import LineHandler
from poweropd.training.progress import TrainingProgress

MAKES = Callable[..., Config]
ROW = {"step": 1, "loss": 3.0, "reward/mean": 0.12345, "reverse_kl": 1.5, "grad_norm": 0.0234}
ROW |= {"completions/mean_length": 10.4, "tokens_per_second": 1234.5, "seconds/step": 2.0}
NUMBERS = "reward +0.123, kl 1.500, grad 0.023, len 10, 1,234 tokens/s, 2 s/step"


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def later(self, seconds: float) -> None:
        self.now += seconds


def printed(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def estimate(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


# Pace.


def test_lines_are_30_seconds_apart_at_first_and_rarer_later() -> None:
    clock = Clock()
    pace, times = Pace(10, clock=clock), list[float]()
    while clock.now < 8 * 3600:
        clock.later(1)
        if pace.is_due():
            times.append(clock.now)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[:10] == [30.0 * number for number in range(1, 11)]
    assert gaps == sorted(gaps)
    assert max(gaps) == LONGEST_SECONDS
    assert len(times) < 150


def test_the_remaining_time_is_that_of_what_this_process_did() -> None:
    clock = Clock()
    pace = Pace(100, done=40, clock=clock)
    assert pace.left(40) == ""  # nothing is known yet
    clock.later(60)
    assert pace.left(60) == ", about 0:02:00 left"
    assert pace.left(100) == ""


# Evaluations.


def test_an_evaluation_says_in_a_file_how_far_it_is() -> None:
    clock, console = Clock(), printed()
    with WorkProgress("tickets", 400, done=100, console=console, clock=clock) as shown:
        for _ in range(3):
            clock.later(20)
            shown.advance(100, tokens=10_000)
    assert text_of(console).splitlines() == [
        "tickets: 100 of 400 completions",
        "tickets: 300 of 400 completions, 500 tokens/s, about 0:00:20 left",
        "tickets: 400 of 400 completions, 500 tokens/s, 0:01:00 in all",
    ]


def test_within_training_an_evaluation_says_what_is_due_alone() -> None:
    clock, said = Clock(), list[str]()
    with WorkProgress("tickets", 400, say=said.append, clock=clock) as shown:
        for _ in range(4):
            clock.later(10)
            shown.advance(100)
    assert said == ["tickets: 300 of 400 completions, about 0:00:10 left"]


def test_on_a_terminal_it_is_a_bar_and_where_it_is_disabled_nothing() -> None:
    for terminal in (True, False):
        console = printed(terminal)
        with WorkProgress("tickets", 4, enabled=False, console=console) as shown:
            shown.advance(4)
        assert text_of(console) == ""
    console = printed(terminal=True)
    with WorkProgress("tickets", 4, console=console) as shown:
        shown.advance(3)
    assert "3/4" in text_of(console)
    assert "completions" not in text_of(console)


def test_a_sweep_in_a_file_says_how_far_it_is(recipe: MAKES) -> None:
    job = Training("a", recipe())
    job.path.mkdir()
    progress, clock = SweepProgress([job]), Clock()
    progress.console, progress.pace = printed(), Pace(job.work, clock=clock)
    progress.update([job])
    for step in (1, 2):
        RunDirectory(job.path).append_metrics({"step": step})
        clock.later(20)
        progress.update([job])
    assert text_of(progress.console).splitlines() == [
        "run begins: 0 of 3 steps",
        "67% done, about 0:00:20 left: run 2 of 3 steps",
    ]


# Training.


def shown_by(progress: TrainingProgress, rows: Sequence[dict[str, Any]], clock: Clock) -> None:
    with progress:
        for row in rows:
            progress.update(row["step"], row)
            clock.later(20)


def test_lines_have_the_registered_numbers_after_step_1_and_then_by_time(
    recipe: MAKES, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, run = Clock(), RunDirectory(tmp_path)
    progress = TrainingProgress(recipe(**{"train.steps": 6}), run, clock=clock)
    rows = [ROW | {"step": step} for step in range(1, 6)] + [{"step": 6, "reward/mean": None}]
    shown_by(progress, rows, clock)
    expected = [
        f"step 1/6: {NUMBERS}, about 0:00:10 left",
        f"step 3/6: {NUMBERS}, about 0:01:00 left",
        f"step 5/6: {NUMBERS}, about 0:00:20 left",
        "step 6/6: ",
    ]
    assert capsys.readouterr().err.splitlines() == expected
    assert run.log_path.read_text().splitlines() == expected


def test_a_quiet_run_keeps_the_log_and_another_process_says_nothing(
    recipe: MAKES, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, main in (("first", True), ("second", False)):
        run = RunDirectory(tmp_path / name)
        run.path.mkdir()
        progress = TrainingProgress(recipe(), run, enabled=False, main=main)
        shown_by(progress, [ROW], Clock())
        assert run.log_path.exists() == main
    assert capsys.readouterr().err == ""


def test_the_log_has_warnings_and_errors_and_nothing_that_a_terminal_obeys(
    recipe: MAKES, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)

    def ends() -> None:
        with TrainingProgress(recipe(), run, enabled=False):
            logging.getLogger("poweropd").warning("look \x1b[31mout")
            raise RunError("the disk\nis gone")

    with pytest.raises(RunError):
        ends()
    logging.getLogger("poweropd").warning("not of this run")
    assert run.log_path.read_text().splitlines() == [
        "look  [31mout",
        "ended by RunError: the disk is gone",
    ]


def test_messages_in_a_file_are_a_line_each() -> None:
    console, text = printed(), "a long message \x1b[31m" + "of many words " * 20
    handler = LineHandler(console)
    handler.handle(logging.LogRecord("poweropd", logging.WARNING, "", 0, "%s", (text,), None))
    assert text_of(console).count("\n") == 1
    assert text_of(console).startswith("WARNING  a long message [31mof many")


# Evaluations of a run.


@pytest.fixture
def evaluated(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    for step, mean, kl in ((0, 0.412, 0.61), (40, 0.775, 0.32)):
        found = {"tickets": {"avg_at_k": estimate(mean, mean - 0.065, mean + 0.06)}}
        divergence = {"reverse_kl": estimate(kl, kl - 0.03, kl + 0.03)}
        run.write_evaluation(step, found, {"divergence": divergence})
    return run


def test_an_evaluation_is_shown_with_the_start_and_the_teacher(evaluated: RunDirectory) -> None:
    assert summary.evaluation_lines(evaluated, 0) == [
        "tickets 41.2 [34.7, 47.2]",
        "reverse_kl 0.61 [0.58, 0.64]",
    ]
    assert summary.evaluation_lines(evaluated, 40) == [
        "tickets 41.2 -> 77.5 [71.0, 83.5]",
        "reverse_kl 0.61 -> 0.32 [0.29, 0.35]",
    ]
    evaluated.write_teacher_evaluation({"tickets": {"avg_at_k": estimate(0.88, 0.84, 0.91)}})
    line = summary.evaluation_lines(evaluated, 40)[0]
    assert line == "tickets 41.2 -> 77.5 [71.0, 83.5] (teacher 88.0)"
    assert summary.teacher_lines(evaluated) == ["tickets 88.0 [84.0, 91.0]"]
    assert summary.evaluation_lines(evaluated, 7) == []
    assert "Avg@k in percent; reverse_kl: reverse KL on held-out" in summary.legend(evaluated, 40)


# Whole runs.


@pytest.fixture
def asked(prompts: Path) -> dict[str, Any]:
    """The sections of a recipe with a benchmark, held-out prompts and the teacher's own score."""
    sums = prompts.with_name("sums.jsonl")
    rows = [{"id": i, "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(4)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data.holdout": 4,
        "evaluate": {
            "every": 2, "teacher": True, "max_new_tokens": 6, "top_k": 0, "divergence": {},
            "benchmarks": [{"file": str(sums), "grader": "contains"}],
        },
    }  # fmt: skip


def next_commands(log: Path) -> dict[str, list[str]]:
    lines = log.read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines[lines.index("next:") + 1 :])
    return {what.strip(): shlex.split(command) for what, command in pairs}


def works(words: Sequence[str]) -> str:
    assert words[0] == "poweropd"
    done = CliRunner().invoke(commands.app, words[1:])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_a_run_shows_its_first_texts_its_evaluations_and_what_to_do_next(
    recipe: MAKES,
    asked: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Trainer(recipe(**asked)).train(until=1)
    said = capsys.readouterr().err.splitlines()
    log = tmp_path / "run" / "train.log"
    first, *lines = log.read_text().splitlines()
    assert first.startswith("the first prompt: '<|im_start|>user\\n")
    assert lines == said
    teacher, legend, *before, completion, step = said
    assert teacher.startswith("teacher: sums ")
    assert legend.startswith("evaluations (before training -> now [95% interval]; ")
    assert [line[: len("step 0: sums")] for line in before] == ["step 0: sums", "step 0: reve"]
    assert "(teacher " in before[0]
    assert completion.startswith("the first completion (")
    assert step.startswith("step 1/3: reward ")
    assert step.endswith("left")
    Trainer(recipe(**asked)).train()
    later = log.read_text().splitlines()[len(lines) + 1 :]
    assert "run goes on at step 1 of 3" in later
    assert sum(" -> " in line for line in later) == 2 + 2 + 2 + 1  # steps 2 and 3, end, legend
    assert "done: 3 steps" in later
    found = next_commands(log)
    assert found.pop("serve")[-1] == str(tmp_path / "run" / "final")
    assert set(found) == {"evaluate", "report", "push"}
    assert "--grader=contains" in found["evaluate"]
    assert "--top-k=0" in found["evaluate"]
    assert found["report"] == ["poweropd", "report", str(tmp_path / "run")]
    for what in ("evaluate", "push"):
        works(found[what])


def test_without_a_benchmark_the_student_is_evaluated_beside_its_teacher(
    recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    system = {"system": "Add the digits.", "enable_thinking": True}
    chosen = {"data.system": system["system"], "data.chat": {"enable_thinking": True}}
    Trainer(recipe(**chosen, **{"train.steps": 1}), progress=False).train()
    words = next_commands(tmp_path / "run" / "train.log")["evaluate"]
    assert "held-out KL" in works(words)
    assert f"--system={system['system']}" in words
    assert "--thinking" in words


@pytest.mark.parametrize("vllm", [None, "found"])
def test_an_adapter_is_served_by_vllm_beside_its_base(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch, vllm: str | None
) -> None:
    monkeypatch.setattr(summary, "find_spec", lambda name: vllm)
    for merge, length in ((False, 6), (True, 3)):
        config = recipe(**{"model.lora": {"r": 4, "merge": merge}})
        run = RunDirectory(config.run.dir)
        lines = summary.closing_lines(run, config, 3)
        (line,) = [line for line in lines if line.startswith("  serve:")]
        words = line.split()[1:]
        if vllm is None:
            assert words == ["transformers", "serve", str(run.final)]
            continue
        assert words[:2] == ["vllm", "serve"]
        assert len(words) == length
        assert words[2] == (str(run.final) if merge else config.model.student)
        assert (f"--lora-modules=run={run.final}" in words) != merge


@pytest.fixture
def complete(recipe: MAKES) -> RunDirectory:
    Trainer(recipe(), progress=False).train()
    return RunDirectory(recipe().run.dir)


def test_a_complete_run_is_kept_although_its_checkpoints_were_removed(
    recipe: MAKES, complete: RunDirectory
) -> None:
    shutil.rmtree(complete.checkpoints)
    kept = {p: p.read_bytes() for p in complete.path.rglob("*") if p.is_file()}
    result = Trainer(recipe(), progress=False).train()
    assert (result.steps, result.final) == (3, complete.final)
    assert {p: p.read_bytes() for p in complete.path.rglob("*") if p.is_file()} == kept
    assert len(complete.metrics()) == 3
