"""What many tests share: tiny models, prompts, and a recipe that trains with them."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from poweropd.config import Config
from poweropd.embedded import END_OF_TEXT, TURN_END, task

# Tests run side by side, each on a core: so do the processes that they start.
os.environ["OMP_NUM_THREADS"] = "1"
# How long an example takes says nothing on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def build_model(*arguments: Any, **options: Any) -> Path:
    """`random_models.build_model`; the process that hands out tests need not load transformers."""
    from random_models import build_model

    return build_model(*arguments, **options)


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "student", END_OF_TEXT, 16, seed=1)


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "teacher", TURN_END, 24, seed=2)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once, and does not wait long for a server at the start."""
    monkeypatch.setattr("poweropd.net.FIRST_DELAY", 0.02)
    monkeypatch.setattr("poweropd.net.START_SECONDS", 0.2)


@pytest.fixture(scope="module")
def server(teacher_dir: Path) -> Iterator[Any]:
    """A `teacher_server.TeacherServer` that the tests of a file share."""
    from teacher_server import TeacherServer

    with TeacherServer(teacher_dir) as running:
        yield running


@pytest.fixture(scope="session")
def code_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second teacher, which ends its turns as the student does."""
    return build_model(tmp_path_factory.mktemp("models") / "code", END_OF_TEXT, 24, seed=5)


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts that belong to "math" and "code" in turn, each with a hint."""
    path = tmp_path_factory.mktemp("data") / "domains.jsonl"
    rows = [
        {"problem": f"{i}+{i + 1}", "domain": ("math", "code")[i % 2], "hint": f"{2 * i + 1} is it"}
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"problem": problem.problem} for problem in task.problems("train", 64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(
    student_dir: Path, teacher_dir: Path, prompts: Path, tmp_path: Path
) -> Callable[..., Config]:
    """Makes a small configuration; overrides are dotted keys, as `recipe(**{"train.steps": 2})`."""

    def make(**overrides: Any) -> Config:
        tree: dict[str, dict[str, Any]] = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"student": str(student_dir), "dtype": "float32"},
            "teacher": {"model": str(teacher_dir), "dtype": "float32"},
            "data": {"prompts": str(prompts)},
            "rollout": {"max_new_tokens": 12},
            "train": {"steps": 3, "prompts_per_step": 4, "learning_rate": 1e-3},
            "checkpoint": {"every": 1},
        }
        for key, value in overrides.items():
            section, _, name = key.partition(".")
            if name:
                tree.setdefault(section, {})[name] = value
            else:
                tree[section] = value
        return Config.from_dict(tree)

    return make


@pytest.fixture(scope="session")
def student_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Makes a student whose embeddings are padded to so many rows."""

    def make(rows: int) -> str:
        directory = tmp_path_factory.mktemp("padded") / str(rows)
        return str(build_model(directory, END_OF_TEXT, 16, seed=3, rows=rows))

    return make


@pytest.fixture(scope="module")
def few(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten prompts."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("".join(prompts.read_text().splitlines(keepends=True)[:10]))
    return path
