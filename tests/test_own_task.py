"""docs/own-task.md as it is written: each of its commands, in order, on its stand-in."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from poweropd import Config
from poweropd.runs.directory import RunDirectory

pytestmark = pytest.mark.journey
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "own-task.md"
WAIT = 'for _ in $(seq 240); do curl -sf "$URL/health" > health && break; sleep 0.5; done'


def script(port: int) -> str:
    """Returns the page's commands as one script, with the server in the background.

    Of the servers transformers' is started; vLLM is an environment of its own.
    """
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    lines = "".join(blocks).replace("8000", str(port)).splitlines()
    lines = [line.removeprefix("    ") for line in lines]
    lines = [line for line in lines if not line.startswith("vllm serve")]
    served = [
        f"{line} > serve.log 2>&1 &\nserver=$!\n{WAIT}" if "transformers serve" in line else line
        for line in lines
    ]
    start = f"set -euo pipefail\nURL=http://localhost:{port}\ntrap 'kill $server' EXIT\nserver=''\n"
    return start + "\n".join(served).replace("curl http", "curl -sS -o served.json http")


@pytest.fixture(scope="module")
def evening(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the page; returns the directory in which it ran."""
    folder = tmp_path_factory.mktemp("evening")
    (folder / "tools").symlink_to(ROOT / "tools")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            ["bash", "-c", script(port)],
            check=False,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
    assert done.returncode == 0, (folder / "log").read_text()[-4000:]
    return folder


def figures(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def accuracy(path: Path) -> float:
    return float(figures(path)["results"]["test"]["avg_at_k"]["mean"])


def test_the_student_gets_better_and_the_teacher_says_how_far_one_could_get(evening: Path) -> None:
    before, after, teacher = (
        accuracy(evening / f"{when}.json") for when in ("before", "after", "teacher")
    )
    assert before + 0.1 < after <= teacher + 0.05


def test_the_divergence_falls(evening: Path) -> None:
    found = RunDirectory(evening / "runs" / "own-task").evaluations()
    first, *_, last = (found[step] for step in sorted(found))
    assert first
    assert last
    before = figures(evening / "divergence-before.json")["divergence"]["reverse_kl"]["mean"]
    log = (evening / "log").read_text()
    assert before > 0
    assert "reverse KL" in log


def test_tune_recommends_a_recipe_of_the_same_run(evening: Path) -> None:
    own = Config.load(evening / "own-task.yaml")
    found = Config.load(evening / "runs" / "own-task-tune" / "recommended.yaml")
    changed = {difference.partition(":")[0] for difference in found.differences(own)}
    assert changed <= {"reward.alpha", "reward.name", "train.learning_rate"}


def test_the_recipe_is_the_one_of_the_package(evening: Path) -> None:
    shipped = Config.load(ROOT / "recipes" / "own-task.yaml")
    own = Config.load(evening / "own-task.yaml")
    models = {"model.student", "teacher.model"}
    changed = {difference.partition(":")[0] for difference in shipped.differences(own)}
    assert changed <= models


def test_the_student_is_served(evening: Path) -> None:
    answer = figures(evening / "served.json")["choices"][0]["message"]["content"]
    assert "Answer: " in answer
