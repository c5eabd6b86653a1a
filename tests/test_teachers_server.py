"""Teachers behind servers, against a real server on loopback that misbehaves when told to."""

import json
import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_server import FAULTS, NAME, TeacherServer, echoing_401
from transformers import AutoTokenizer

from poweropd import Config, Trainer, net
from poweropd.config.teachers import TeacherConfig
from poweropd.data.rollout import Example, Request, Rollout
from poweropd.errors import RunError, UsageError
from poweropd.rollouts.base import Sampling
from poweropd.teachers import base
from poweropd.teachers.server import ServerTeacher

pytestmark = pytest.mark.usefixtures("soon")
MAKES = Callable[..., Config]


@pytest.fixture
def server(teacher_dir: Path) -> Iterator[TeacherServer]:
    with TeacherServer(teacher_dir) as running:
        yield running


@pytest.fixture
def remote(recipe: MAKES, server: TeacherServer, teacher_dir: Path) -> MAKES:
    """As `recipe`, with the teacher on the server."""

    def make(**overrides: Any) -> Config:
        teacher = {"model": NAME, "servers": [server.url], "tokenizer": str(teacher_dir)}
        return recipe(**{**{f"teacher.{k}": v for k, v in teacher.items()}, **overrides})

    return make


def rows(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_losses(mine: Config, theirs: Config) -> None:
    ours, others = rows(mine), rows(theirs)
    assert len(ours) == len(others) > 0
    for a, b in zip(ours, others, strict=True):
        assert a["num_tokens"] == b["num_tokens"]
        for key in ("loss", "reward/mean", "reward/min", "log_ratio/max"):
            assert a[key] == pytest.approx(b[key], abs=1e-5)


def undisturbed(recipe: MAKES, tmp_path: Path, **overrides: Any) -> Config:
    """The same run with the teacher in this process."""
    config = recipe(**overrides, **{"run.dir": str(tmp_path / "undisturbed")})
    Trainer(config, progress=False).train()
    return config


def test_every_fault_of_an_answer_is_overcome_and_changes_nothing(
    recipe: MAKES, remote: MAKES, server: TeacherServer, tmp_path: Path
) -> None:
    overrides = {"train.steps": len(FAULTS) + 1, "objective.stop": "cross", "reward.name": "clip"}
    config = remote(**overrides, **{"teacher.timeout": 0.5})
    trainer = Trainer(config, progress=False)
    for fault in FAULTS:
        server.faults = [fault]
        trainer.train(until=trainer.steps_done + 1)
        assert not server.faults, fault.__name__
    trainer.train()
    assert_same_losses(config, undisturbed(recipe, tmp_path, **overrides))


def test_a_restart_is_waited_out(
    recipe: MAKES, remote: MAKES, server: TeacherServer, tmp_path: Path
) -> None:
    trainer = Trainer(remote(), progress=False)
    trainer.train(until=1)
    server.stop()
    restart = threading.Timer(0.5, server.start)
    restart.start()
    assert trainer.train().steps == 3
    restart.join()
    assert_same_losses(remote(), undisturbed(recipe, tmp_path))


def test_a_server_that_stays_away_ends_the_run_with_what_was_done_in_a_checkpoint(
    recipe: MAKES, remote: MAKES, server: TeacherServer, tmp_path: Path
) -> None:
    config = remote(**{"teacher.patience": 0.3, "checkpoint.every": 100})
    trainer = Trainer(config, progress=False)
    trainer.train(until=1)
    trainer.steps_done, checkpoints = 1, trainer.run.checkpoints
    for path in (checkpoints / "step-1").iterdir():
        path.unlink()
    (checkpoints / "step-1").rmdir()
    server.stop()
    message = f"teacher server {server.url}: ConnectError .* for 0.3 seconds .* start it again"
    with pytest.raises(RunError, match=message):
        trainer.train()
    assert (checkpoints / "step-1").is_dir()
    server.start()
    assert Trainer(config, progress=False).train().steps == 3
    assert_same_losses(config, undisturbed(recipe, tmp_path))


def test_answers_that_stay_wrong_end_the_run_and_none_is_used(
    remote: MAKES, server: TeacherServer
) -> None:
    trainer = Trainer(remote(**{"teacher.patience": 0.3}), progress=False)
    before = {k: v.clone() for k, v in trainer.student.trained_weights().items()}
    server.faults = [FAULTS[0]] * 1000
    with pytest.raises(RunError, match=r"an answer without one log-prob .* tokens, for 0.3 s"):
        trainer.train()
    after = trainer.student.trained_weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_model_under_the_same_name_after_a_restart_ends_the_run(
    remote: MAKES, server: TeacherServer
) -> None:
    trainer = Trainer(remote(), progress=False)
    server.faults, server.shift = [FAULTS[5]], 0.5
    with pytest.raises(RunError, match=r"gives other log-probs than .* \(mean difference 0.5\)"):
        trainer.step(0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher.model": "other"}, UsageError, "teacher.model: {url} serves teacher, not other"),
        (
            {"teacher.api_key_env": "NO_SUCH_KEY"},
            UsageError,
            "NO_SUCH_KEY, which is not set",
        ),
        ({"rollout.max_new_tokens": 60}, UsageError, "exceed the teacher's context of 79 tokens"),
        ({"teacher.model": "./nowhere", "teacher.tokenizer": None}, UsageError, "set teacher.tok"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(
    remote: MAKES,
    server: TeacherServer,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    server.context, server.name = 80, change.get("teacher.model", NAME).replace("other", NAME)
    with pytest.raises(error, match=message.replace("{url}", server.url)):
        Trainer(remote(**change), progress=False)


def test_a_server_that_is_down_at_the_start_is_named(remote: MAKES, server: TeacherServer) -> None:
    server.stop()
    message = f"{server.url}: Connect.* for 0.2 seconds: .* or correct teacher.servers"
    with pytest.raises(RunError, match=message):
        Trainer(remote(), progress=False)
    server.start()


def test_a_server_with_a_smaller_vocabulary_is_refused(
    remote: MAKES, server: TeacherServer, student_rows: Callable[[int], str]
) -> None:
    padded = Trainer(remote(**{"model.student": student_rows(128)}), progress=False)
    assert padded.student.vocab_size == 103  # the server has no padding
    server.vocab_size = 90
    with pytest.raises(UsageError, match="does not know id 102, but the student's vocabulary has"):
        Trainer(remote(), progress=False)


def test_a_student_with_added_tokens_trains_on_those_that_the_server_has(
    remote: MAKES, student_dir: Path, student_rows: Callable[[int], str], tmp_path: Path
) -> None:
    padded = Path(student_rows(128))
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    tokenizer.add_tokens(["<new>", "<newer>"])
    wide = tmp_path / "wide"
    shutil.copytree(padded, wide)
    tokenizer.save_pretrained(wide)
    trainer = Trainer(remote(**{"model.student": str(wide)}), progress=False)
    assert trainer.inputs.unshared == {103, 104}
    assert trainer.student.vocab_size == trainer.engine.vocab_size == 103
    trainer.train()
    tokenizer.save_pretrained(tmp_path / "teacher")  # and the server has fewer rows
    teacher = {"teacher.tokenizer": str(tmp_path / "teacher"), "run.dir": str(tmp_path / "other")}
    served = remote(**{"model.student": str(wide), **teacher})
    with pytest.raises(UsageError, match="does not know id 104, but the student's vocabulary has"):
        Trainer(served, progress=False)


def test_servers_of_different_weights_are_refused(
    remote: MAKES, server: TeacherServer, teacher_dir: Path
) -> None:
    with TeacherServer(teacher_dir) as other:
        other.shift = 0.5
        with pytest.raises(RunError, match=r"differ by 0.5 .* serve the same weights"):
            Trainer(remote(**{"teacher.servers": [server.url, other.url]}), progress=False)


def test_the_key_is_sent_and_appears_nowhere(
    remote: MAKES,
    server: TeacherServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEACHER_KEY", "sesame-4711")
    config = remote(**{"teacher.api_key_env": "TEACHER_KEY", "log.trackers": ["tensorboard"]})
    trainer = Trainer(config, progress=False)
    trainer.train(until=2)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sesame-4711"}
    server.faults = [echoing_401]
    with pytest.raises(RunError, match=r"HTTP 401: .*Bearer \[key\].*api_key_env") as error:
        trainer.train()
    assert "sesame" not in str(error.value) + caplog.text + repr(vars(trainer.teacher.pool))
    written = [path for path in Path(config.run.dir).rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if b"sesame" in path.read_bytes()]


def examples(config: Config) -> list[Example]:
    trainer = Trainer(config, progress=False)
    return trainer.scored(trainer.sample(0))


def connect(*servers: TeacherServer, **settings: Any) -> ServerTeacher:
    defaults = {"timeout": 10.0, "concurrency": 2, "patience": 5.0}
    urls = [server.url for server in servers]
    return ServerTeacher(TeacherConfig(model=NAME, servers=urls, **defaults | settings))


def test_a_prompt_over_the_servers_context_names_its_row(
    recipe: MAKES, server: TeacherServer
) -> None:
    waiting = examples(recipe())
    server.context = 20
    row = waiting[0].prompt.index
    message = f"{server.url} refuses .* data.prompts row {row} .*HTTP 400: .*max_tokens"
    with pytest.raises(RunError, match=message):
        base.score(connect(server), waiting)


def test_requests_go_to_the_least_loaded_server_within_bounds(
    recipe: MAKES, server: TeacherServer, teacher_dir: Path
) -> None:
    waiting = examples(recipe(**{"train.prompts_per_step": 16}))
    with TeacherServer(teacher_dir) as other:
        teacher = connect(server, other)
        server.gate, other.gate = threading.Event(), threading.Event()
        for example in waiting:
            teacher.submit(example)
        deadline = time.monotonic() + 10
        while (server.in_flight, other.in_flight) != (2, 2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        other.gate.set()
        while len(other.requests) < len(waiting) - 2:  # all but the two that the first one holds
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(server.requests) == 2
        server.gate.set()
        scored = teacher.collect()
        assert (server.most_in_flight, other.most_in_flight) == (2, 2)
        assert len(server.connections) <= 2
        assert len(other.connections) <= 2
    for mine, theirs in zip(scored, waiting, strict=True):
        assert mine.rollout == theirs.rollout
        torch.testing.assert_close(mine.teacher_log_probs, theirs.teacher_log_probs)


def test_one_server_of_two_may_stay_away(
    recipe: MAKES, server: TeacherServer, teacher_dir: Path
) -> None:
    waiting = examples(recipe(**{"train.prompts_per_step": 16}))
    with TeacherServer(teacher_dir) as other:
        teacher = connect(server, other, patience=0.2)
        teacher.check([[1, 2, 3]])
    scored = base.score(teacher, waiting)
    for mine, theirs in zip(scored, waiting, strict=True):
        torch.testing.assert_close(mine.teacher_log_probs, theirs.teacher_log_probs)


class SlowEngine:
    """Ends one completion, and the others only when the teacher has been asked about it."""

    def __init__(self, rollouts: Sequence[Rollout], server: TeacherServer) -> None:
        self.rollouts, self.server = rollouts, server

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        first, *others = self.rollouts
        self.server.arrived.clear()
        yield first
        assert self.server.arrived.wait(10), "the first completion was not scored meanwhile"
        yield from others

    def sync(self) -> None:
        """Nothing to take over."""


def test_a_completion_is_scored_while_others_are_sampled(
    remote: MAKES, server: TeacherServer
) -> None:
    trainer = Trainer(remote(), progress=False)
    expected = trainer.scored(trainer.sample(0))
    trainer.engine = SlowEngine(list(trainer.sample(0)), server)
    found = trainer.scored(trainer.sample(0))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.teacher_log_probs, b.teacher_log_probs)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *[("3", 3.0), ("-1", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", 0.0)],
        *[("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", 0.0), ("nan", 0.0)],
    ],
)
def test_retry_after(header: str, seconds: float) -> None:
    assert net.retry_after(header) == seconds


def test_delays_double_to_a_limit_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "FIRST_DELAY", 0.5)
    for failures, longest in ((0, 0.5), (1, 1.0), (4, 8.0), (5, 10.0), (10_000, 10.0)):
        delays = {net.backoff(failures) for _ in range(20)}
        assert longest / 2 <= min(delays) < max(delays) <= longest


def test_a_pause_leaves_the_users_random_numbers_as_they_are() -> None:
    before = random.getstate()
    net.backoff(3)
    assert random.getstate() == before
