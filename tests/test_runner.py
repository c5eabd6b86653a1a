"""Evaluations: rows that do not depend on interruptions, and what goes wrong."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from poweropd import Config, Trainer, commands
from poweropd.embedded import task
from poweropd.errors import RunError, UsageError
from poweropd.evaluation.benchmarks import Problem
from poweropd.evaluation.runner import Evaluation, Subject, load_subject
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.grading.grader import Grader

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("poweropd.commands", "poweropd.evaluation.command", "poweropd.rollouts.transformers"),
        "transformers.models.qwen3.modeling_qwen3",
    ]
)
SETTINGS = EvaluationSettings(n=2, max_new_tokens=12, group_size=16)


@pytest.fixture(scope="session")
def subject(student_dir: Path) -> Subject:
    return load_subject(str(student_dir), "float32")


@pytest.fixture(scope="session")
def grader() -> Any:
    with Grader() as made:
        yield made


def problems(count: int) -> list[Problem]:
    return [Problem(p.id, p.problem, p.answer) for p in task.problems("evaluation", count)]


def rows(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda row: (row["id"], row["sample"]))


def test_every_completion_is_kept_with_its_grade(
    subject: Subject, grader: Grader, tmp_path: Path
) -> None:
    evaluation = Evaluation("sums", problems(20), SETTINGS, tmp_path, "model")
    summary = evaluation.run(subject, grader, progress=False)
    found = rows(tmp_path / "sums.jsonl")
    assert len(found) == 40
    assert summary.problems == 20
    assert all(row["tokens"] <= 12 and row["reason"] for row in found)
    assert json.loads((tmp_path / "sums.settings.json").read_text())["temperature"] == 0.6


def test_an_interrupted_evaluation_repeats_no_completion(
    subject: Subject, grader: Grader, tmp_path: Path
) -> None:
    whole = Evaluation("sums", problems(20), SETTINGS, tmp_path / "whole", "model")
    whole.run(subject, grader, progress=False)
    lines = (tmp_path / "whole" / "sums.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (0, 5, 23):
        folder = tmp_path / str(kept)
        Evaluation("sums", problems(20), SETTINGS, folder, "model")
        (folder / "sums.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:30])
        Evaluation("sums", problems(20), SETTINGS, folder, "model").run(
            subject, grader, progress=False
        )
        assert (folder / "sums.jsonl").read_bytes().startswith(b"".join(lines[:kept]))
        assert rows(folder / "sums.jsonl") == rows(tmp_path / "whole" / "sums.jsonl")


def test_the_seed_decides_and_other_settings_are_refused(
    subject: Subject, grader: Grader, tmp_path: Path
) -> None:
    def texts(seed: int, folder: str) -> list[str]:
        settings = EvaluationSettings(n=2, max_new_tokens=12, seed=seed)
        evaluation = Evaluation("sums", problems(4), settings, tmp_path / folder, "model")
        evaluation.run(subject, grader, progress=False)
        return [row["completion"] for row in rows(evaluation.path)]

    assert texts(1, "a") == texts(1, "b") != texts(2, "c")
    asked = {"settings": EvaluationSettings(n=2, max_new_tokens=12, seed=1), "model": "model"}
    for key, value, message in (
        ("settings", EvaluationSettings(n=2, max_new_tokens=12, seed=3), "seed: 1 != 3"),
        ("model", "another", "model: 'model' != 'another'"),
        ("problems", problems(3), "problems: .*; count: 4 != 3"),
    ):
        other = {"problems": problems(4), **asked, key: value}
        with pytest.raises(UsageError, match=f"of another evaluation \\({message}\\)"):
            Evaluation("sums", folder=tmp_path / "a", **other)


def test_processes_share_the_work_and_sample_what_one_would(
    subject: Subject, grader: Grader, tmp_path: Path
) -> None:
    def run(share: tuple[int, int]) -> list[dict[str, Any]]:
        folder = tmp_path / str(share)
        evaluation = Evaluation("sums", problems(5), SETTINGS, folder, "model", share)
        evaluation.run(subject, grader, progress=False)
        return evaluation.rows

    shared = [row for first in range(3) for row in run((first, 3))]
    shared.sort(key=lambda row: (row["id"], row["sample"]))
    run((0, 1))
    assert shared == rows(tmp_path / str((0, 1)) / "sums.jsonl")


def run_command(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = ["poweropd", *arguments]
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        commands.main()


@pytest.mark.thorough
def test_a_killed_evaluation_of_the_embedded_student_ends_with_the_same_rows(
    tmp_path: Path,
) -> None:
    def start(folder: Path) -> Any:
        arguments = ["eval", "embedded:student", "--benchmark", "embedded", "--n", "8"]
        arguments += ["--dtype", "float32", "--out", str(folder), "--json", str(folder) + ".json"]
        process = SERVER.Process(target=run_command, args=([*arguments, "--limit", "256"],))
        process.start()
        return process

    def count(folder: Path) -> int:
        path = folder / "embedded.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    killed, moment = start(tmp_path / "killed"), random.Random(1).randint(200, 1700)
    while count(tmp_path / "killed") < moment and killed.is_alive():
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert 0 < count(tmp_path / "killed") < 2048
    for process in (start(tmp_path / "killed"), start(tmp_path / "whole")):
        process.join()
        assert process.exitcode == 0
    found = rows(tmp_path / "killed" / "embedded.jsonl")
    assert len(found) == 2048
    assert found == rows(tmp_path / "whole" / "embedded.jsonl")
    figures = json.loads((tmp_path / "whole.json").read_text())["results"]["embedded"]
    assert 0.5 <= figures["avg_at_k"]["mean"] <= 0.8
    assert figures["avg_at_k"]["low"] < figures["avg_at_k"]["mean"] < figures["avg_at_k"]["high"]


def test_a_model_that_says_nothing_is_an_error(
    subject: Subject, grader: Grader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject.tokenizer, "decode", lambda *_, **__: "")
    evaluation = Evaluation("sums", problems(2), SETTINGS, tmp_path, "model")
    evaluation.run(subject, grader, progress=False)
    with pytest.raises(RunError, match="every completion is empty"):
        evaluation.check_not_empty()


def test_a_full_disk_keeps_what_was_written(
    subject: Subject, grader: Grader, tmp_path: Path
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    evaluation = Evaluation("sums", problems(2), SETTINGS, tmp_path, "model")
    evaluation.path.symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write a completion \(No space left on device\)"):
        evaluation.run(subject, grader, progress=False)


def test_the_context_bounds_the_completion(
    subject: Subject, grader: Grader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = EvaluationSettings(n=1, max_new_tokens=4096)
    evaluation = Evaluation("sums", problems(2), settings, tmp_path, "model")
    evaluation.run(subject, grader, progress=False)
    assert "instead of 4096: the model's context has 256 tokens" in caplog.text
    long = [Problem("1", "1+2" * 200, "3")]
    with pytest.raises(UsageError, match="leaves no room"):
        Evaluation("long", long, settings, tmp_path, "model").run(subject, grader, progress=False)


def command_output(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["poweropd", "eval", *arguments])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    return int(stopped.value.code or 0)


def test_completions_from_elsewhere_are_graded_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.jsonl"
    given = [("a", "4", "so \\boxed{4}"), ("b", "5", "It is 6."), ("c", "7", "")]
    lines = [{"id": i, "answer": gold, "completion": text} for i, gold, text in given]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = tmp_path / "figures.json"
    assert command_output(["--grade", str(path), "--json", str(figures)], monkeypatch) == 0
    found = json.loads(figures.read_text())
    assert [grade["reason"] for grade in found["grades"]] == ["correct", "wrong", "no_answer"]
    assert found["results"]["theirs"]["solved"] == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert command_output(["--grade", str(path), "--compare", str(figures)], monkeypatch) == 0
    assert "difference [95%]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a MODEL to evaluate, or --grade FILE"),
        (["embedded:student"], "--benchmark: expected one or more of gsm8k"),
        (["embedded:student", "--benchmark", "mmlu"], "unknown benchmark 'mmlu': expected one of"),
        (["embedded:student", "--benchmark", "embedded", "--n", "2", "--k", "3"], "at most --n=2"),
        (["embedded:pupil", "--benchmark", "embedded"], "the embedded models are"),
        (["--grade", "none.jsonl"], "none.jsonl: cannot read it (No such file"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command_output(arguments, monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_evaluation_during_training_keeps_the_best_student(
    recipe: Callable[..., Config], prompts: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"id": 1, "problem": "1+2", "answer": "3"}\n')
    names = ["embedded", str(own)]
    section = {"every": 2, "benchmarks": names, "limit": 6, "max_new_tokens": 8}
    trainer = Trainer(recipe(**{"train.steps": 3, "evaluate": section}), progress=False)
    trainer.train()
    found = trainer.run.metrics()
    assert [("eval/embedded/avg_at_k" in row) for row in found] == [False, True, True]
    assert (tmp_path / "run" / "eval" / "step-2" / "embedded.jsonl").exists()
    assert (tmp_path / "run" / "eval" / "step-2" / "own.jsonl").exists()
    assert "eval/own/avg_at_k" in found[1]
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "best.json").read_text())["metric"] == "avg_at_k"
