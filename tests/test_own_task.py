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
START = """\
set -euo pipefail
server=''
trap '[ -z "$server" ] || kill $server' EXIT
"""
WAIT = """\
for _ in $(seq 240); do curl -sf http://localhost:{port}/health > health && break; sleep 0.5; done
"""


def script(port: int) -> str:
    """Returns the page's commands as one script, with the server in the background.

    Of the servers transformers' is started; vLLM is an environment of its own.
    """
    blocks = re.findall(r"(?:^    .*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    lines = [line.removeprefix("    ") for line in "".join(blocks).splitlines()]
    lines = [line.replace("localhost:8000", f"localhost:{port}") for line in lines]
    written = [START]
    for line in lines:
        if line.startswith("transformers serve"):
            serve = line.replace("--port 8000", f"--port {port}")
            written.append(f"{serve} > serve.log 2>&1 &\nserver=$!\n{WAIT.format(port=port)}")
        elif not line.startswith("vllm serve"):
            written.append(line.replace("curl ", "curl -sS -o served.json "))
    return "\n".join(written)


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


def reverse_kl(path: Path) -> float:
    return float(figures(path)["divergence"]["reverse_kl"]["mean"])


def test_the_student_gets_better_and_the_teacher_says_how_far_one_could_get(evening: Path) -> None:
    before, after, teacher = (
        accuracy(evening / f"{when}.json") for when in ("before", "after", "teacher")
    )
    assert before + 0.2 < after <= teacher
    assert teacher > 0.95


def test_the_divergence_falls_to_a_third(evening: Path) -> None:
    before, after = (
        reverse_kl(evening / f"divergence-{when}.json") for when in ("before", "after")
    )
    assert 0 < after < before / 3


@pytest.mark.parametrize("name", ["own-task", "own-task-lora"])
def test_the_run_itself_tells_the_same(evening: Path, name: str) -> None:
    evaluations = RunDirectory(evening / "runs" / name).path / "eval"
    steps = sorted(int(path.name.removeprefix("step-")) for path in evaluations.glob("step-*"))
    assert len(steps) == 11  # before the first step, and ten times during the run
    first, last = (evaluations / f"step-{step}" / "results.json" for step in (steps[0], steps[-1]))
    teacher = accuracy(evaluations / "teacher" / "results.json")
    assert accuracy(first) + 0.2 < accuracy(last) <= teacher
    assert reverse_kl(last) < reverse_kl(first) / 3


def test_tune_recommends_one_of_its_settings_for_the_same_run(evening: Path) -> None:
    own = Config.load(evening / "own-task.yaml")
    found = Config.load(evening / "runs" / "own-task-tune" / "recommended.yaml")
    changed = {difference.partition(":")[0] for difference in found.differences(own)}
    assert changed <= {"reward.name", "reward.alpha", "reward.scale", "train.learning_rate"}
    assert found.train.learning_rate in (1e-4, 4e-4)
    tuned = figures(evening / "runs" / "own-task-tune" / "tune.json")
    assert len(tuned["trials"]) == 6
    assert tuned["reason"] in " ".join((evening / "log").read_text().split())


def test_the_student_is_served(evening: Path) -> None:
    answer = figures(evening / "served.json")["choices"][0]["message"]["content"]
    assert answer.endswith("Answer: delivery")


def test_what_would_be_published_names_no_path_and_no_prompt(evening: Path) -> None:
    log = (evening / "log").read_text()
    said = log[log.rindex("model.safetensors") :]
    assert "| test | 100 |" in said
    assert str(evening) not in said
    assert "tickets/" not in said
    assert "Name the category" not in said
