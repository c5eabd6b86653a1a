"""The vllm_server engine against a real server that is killed, restarted and shared for real."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from poweropd import Config, Trainer
from poweropd.embedded.build import END_OF_TEXT
from poweropd.errors import RunError, UsageError
from tests.conftest import build_model
from tests.test_rollouts_vllm import OPTIONS, generate, metrics, worst

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
MAKES = Callable[..., Config]
PYTHON = os.environ.get("POWEROPD_VLLM_PYTHON", sys.executable)
TOGETHER = {"train.steps": 6, "train.prompts_per_step": 4}


class RolloutServer:
    """`python -m vllm...api_server` on a free port, in a process group of its own."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.model, self.log, self.url = model, log, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32"]
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(1 << 26)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """All of it at once: without its API process the engine would live on."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> None:
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text()[-2000:])


@pytest.fixture(scope="module")
def wide_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "wide", END_OF_TEXT, 64, seed=1)


@pytest.fixture(scope="module")
def server(
    wide_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RolloutServer]:
    running = RolloutServer(wide_student, tmp_path_factory.mktemp("server") / "log")
    try:
        running.wait()
        yield running
    finally:
        running.kill()


@pytest.fixture
def served(recipe: MAKES, server: RolloutServer, wide_student: Path, tmp_path: Path) -> MAKES:
    def make(name: str, **overrides: Any) -> Config:
        own = {"run.dir": str(tmp_path / name), "model.student": str(wide_student)}
        own |= {"rollout.engine": "vllm_server", "rollout.server": {"url": server.url}}
        return recipe(**{**own, **TOGETHER, **overrides})

    return make


def test_a_run_with_a_server_is_the_run_with_the_engine_in_process(
    served: MAKES, tmp_path: Path
) -> None:
    trainer = Trainer(served("server"), progress=False)
    before = generate(trainer, 4)
    trainer.train()
    assert worst(trainer, generate(trainer, 4)) < 1e-4 < 1e-2 < worst(trainer, before)
    assert len(list((tmp_path / "server" / "weights").iterdir())) == 1  # the last
    inside = served("inside", **{"rollout.engine": "vllm", "rollout.vllm": OPTIONS})
    Trainer(inside, progress=False).train()
    assert_same_losses(tmp_path / "server", tmp_path / "inside")


def assert_same_losses(one: Path, two: Path) -> None:
    mine, theirs = metrics(one), metrics(two)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a["num_tokens"] == b["num_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_a_server_killed_in_a_rollout_and_restarted_changes_nothing(
    served: MAKES, server: RolloutServer, tmp_path: Path
) -> None:
    long = {"train.steps": 4, "rollout.max_new_tokens": 200}
    long["rollout.server"] = {"url": server.url, "concurrency": 2}
    Trainer(served("undisturbed", **long), progress=False).train()
    trainer = Trainer(served("killed", **long), progress=False)
    trainer.train(until=2)
    killed = threading.Event()

    def restart() -> None:
        time.sleep(0.15)  # in the midst of the third step's rollout
        server.kill()
        killed.set()
        server.start()

    threading.Thread(target=restart).start()
    trainer.train()
    assert killed.is_set()
    server.wait()
    assert_same_losses(tmp_path / "undisturbed", tmp_path / "killed")


def test_ahead_is_deterministic_and_resumes(served: MAKES, tmp_path: Path) -> None:
    ahead = {"rollout.staleness": 1}
    Trainer(served("ahead", **ahead), progress=False).train()
    for until in (3, None):
        Trainer(served("parts", **ahead), progress=False).train(until=until)
    assert metrics(tmp_path / "ahead") == metrics(tmp_path / "parts")


def test_a_second_run_on_the_server_ends_the_first_before_it_trains_on_anything(
    served: MAKES,
) -> None:
    first = Trainer(served("first"), progress=False)
    first.train(until=2)
    Trainer(served("second"), progress=False)
    with pytest.raises(RunError, match="another run has given this server its weights"):
        first.train()
    assert len(metrics(first.run.path)) == 2


def test_a_server_that_is_not_there_or_serves_another_model_is_named(
    served: MAKES, tmp_path: Path
) -> None:
    nowhere = {"rollout.server": {"url": "http://127.0.0.1:9"}}
    with pytest.raises(UsageError, match=r"no vLLM server answers at http://127.0.0.1:9 .*vllm ser"):
        Trainer(served("nowhere", **nowhere), progress=False)
    other = build_model(tmp_path / "other", END_OF_TEXT, 96, seed=1)
    with pytest.raises(RunError, match="reload_weights failed .* must serve the student's archit"):
        Trainer(served("wider", **{"model.student": str(other)}), progress=False)
    # Its weights are half another model's now; the next run's sync makes them whole.
    Trainer(served("after"), progress=False).step(0)
