"""The teacher's own score on the benchmarks of a run: in this process and on servers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from teacher_server import NAME, Handler, TeacherServer

from poweropd import Config, Trainer
from poweropd.errors import RunError, UsageError
from poweropd.runs.directory import RunDirectory

MAKES = Callable[..., Config]


@pytest.fixture
def server(teacher_dir: Path) -> Iterator[TeacherServer]:
    with TeacherServer(teacher_dir) as server:
        yield server


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    """An `evaluate` section whose problems a random model sometimes solves."""
    path = tmp_path / "sums.jsonl"
    rows = [{"id": i, "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "every": 9, "teacher": True, "benchmarks": [{"file": str(path), "grader": "contains"}],
        "max_new_tokens": 6, "n": 2, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip


def completions(run: Path) -> list[tuple[str, str]]:
    text = (run / "eval" / "teacher" / "sums.jsonl").read_text()
    return sorted((row["id"], row["completion"]) for row in map(json.loads, text.splitlines()))


def served(server: TeacherServer, teacher_dir: Path) -> dict[str, Any]:
    return {"model": NAME, "servers": [server.url], "tokenizer": str(teacher_dir), "patience": 1.0}


def test_a_served_teacher_writes_what_one_in_process_does(
    recipe: MAKES, asked: dict[str, Any], server: TeacherServer, teacher_dir: Path, tmp_path: Path
) -> None:
    here = {"model": str(teacher_dir), "dtype": "float32"}
    for name, teacher in {"here": here, "there": served(server, teacher_dir)}.items():
        config = recipe(**{"evaluate": asked, "teacher": teacher, "run.dir": str(tmp_path / name)})
        Trainer(config, progress=False).train(until=1)
    assert completions(tmp_path / "here") == completions(tmp_path / "there")
    found = [RunDirectory(tmp_path / name).teacher_evaluation() for name in ("here", "there")]
    assert found[0] == found[1]
    assert found[0]["sums"]["problems"] == 4


def test_it_is_measured_once_in_a_run(recipe: MAKES, asked: dict[str, Any], tmp_path: Path) -> None:
    config = recipe(**{"evaluate": asked, "run.dir": str(tmp_path / "run")})
    Trainer(config, progress=False).train(until=1)
    results = tmp_path / "run" / "eval" / "teacher" / "results.json"
    written = results.stat().st_mtime_ns
    Trainer(config, progress=False).train(until=2)
    assert results.stat().st_mtime_ns == written
    assert "teacher" not in RunDirectory(tmp_path / "run").evaluations()[0]


def test_an_offloaded_teacher_goes_back(recipe: MAKES, asked: dict[str, Any]) -> None:
    trainer = Trainer(recipe(**{"evaluate": asked, "teacher.offload": True}), progress=False)
    trainer.train(until=1)
    assert trainer.models.teacher.device.type == "cpu"


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (404, {"error": {"message": "Not Found"}}, "evaluate.teacher"),
        (200, {"choices": [{"text": "4"}]}, "no token ids"),
    ],
)
def test_a_server_without_completions_is_one_line(
    recipe: MAKES, asked: dict[str, Any], server: TeacherServer, teacher_dir: Path,
    monkeypatch: pytest.MonkeyPatch, status: int, answer: dict[str, Any], message: str,
) -> None:  # fmt: skip
    original = Handler.answer

    def told(handler: Handler, code: int, found: dict[str, Any]) -> None:
        sampled = "prompt_logprobs" not in found.get("choices", [{}])[0] and "choices" in found
        original(handler, *((status, answer) if sampled else (code, found)))

    monkeypatch.setattr(Handler, "answer", told)
    config = recipe(**{"evaluate": asked, "teacher": served(server, teacher_dir)})
    with pytest.raises((RunError, UsageError), match=message) as caught:
        Trainer(config, progress=False).train(until=1)
    assert "\n" not in str(caught.value)
