"""The vllm_server engine against a real server that is killed, restarted and shared for real."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from random_models import build_model
from test_rollouts_vllm import OPTIONS, generate, metrics, worst
from vllm_server import VllmServer, require_vllm

from poweropd import Config, Trainer
from poweropd.embedded import END_OF_TEXT
from poweropd.errors import RunError, UsageError

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
MAKES = Callable[..., Config]
TOGETHER = {"train.steps": 6, "train.prompts_per_step": 4}


@pytest.fixture(scope="module")
def wide_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "wide", END_OF_TEXT, 64, seed=1)


@pytest.fixture(scope="module")
def server(wide_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    require_vllm()
    log = tmp_path_factory.mktemp("server") / "log"
    with VllmServer(wide_student, log, environment={"VLLM_SERVER_DEV_MODE": "1"}) as running:
        yield running


@pytest.fixture
def served(recipe: MAKES, server: VllmServer, wide_student: Path, tmp_path: Path) -> MAKES:
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
    served: MAKES, server: VllmServer, tmp_path: Path
) -> None:
    long = {"train.steps": 4, "rollout.max_new_tokens": 200}
    long["rollout.server"] = {"url": server.url, "concurrency": 2}
    Trainer(served("undisturbed", **long), progress=False).train()
    trainer = Trainer(served("killed", **long), progress=False)
    trainer.train(until=2)
    killed = threading.Event()

    def restart() -> None:
        time.sleep(0.15)  # in the midst of the third step's rollout
        server.kill_group()
        killed.set()
        server.launch()

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
    with pytest.raises(UsageError, match=r"no vLLM server answers at http://127.0.0.1:9 .*vllm s"):
        Trainer(served("nowhere", **nowhere), progress=False)
    # The last test: vLLM does not recover from weights that do not fit.
    other = build_model(tmp_path / "other", END_OF_TEXT, 96, seed=1)
    with pytest.raises(RunError, match=r"reload_weights failed .* must serve the student's archit"):
        Trainer(served("wider", **{"model.student": str(other)}), progress=False)
