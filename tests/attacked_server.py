"""An HTTP server on loopback that answers well, but for requests that a fault answers instead."""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import make_request, make_rollout

from poweropd import net
from poweropd.config.teachers import TeacherConfig
from poweropd.data.rollout import Example, make_example
from poweropd.errors import RunError, UsageError, one_line
from poweropd.net import JsonClient
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.guards import CheckedEngine
from poweropd.rollouts.vllm_server import VllmServerEngine
from poweropd.teachers import base
from poweropd.teachers.server import ServerTeacher

Answer = dict[str, Any]
KEY = "sk-Sesame0pen-4711-wxyz"
VOCAB = 50
PATIENCE, TIMEOUT = 0.15, 0.5  # seconds


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes clients try again at once and give up soon."""
    monkeypatch.setattr(net, "FIRST_DELAY", 0.005)
    monkeypatch.setattr(net, "LONGEST_DELAY", 0.02)
    monkeypatch.setattr(net, "START_SECONDS", PATIENCE)
    monkeypatch.setattr(net, "MAX_ANSWER_BYTES", 2**20)
    monkeypatch.setenv("ATTACKED_KEY", KEY)


class Attacked(ThreadingHTTPServer):
    """Answers well, but for the first `count` requests to `path`, which `fault` answers."""

    daemon_threads = True

    def __init__(self, answers: Callable[[str, Answer], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.stopped = answers, threading.Event()
        self.fault: Fault | None = None
        self.path, self.count, self.faults = "", 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that have gone are what this file is about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # two small writes would wait for an acknowledgement
    server: Attacked

    def do_GET(self) -> None:
        self.respond({})

    def do_POST(self) -> None:
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, body: Answer) -> None:
        right = self.server.answers(self.path, body)
        if self.server.count > 0 and self.server.fault and self.path.startswith(self.server.path):
            self.server.count -= 1
            self.server.faults += 1
            self.server.fault(self, copy.deepcopy(right))
        else:
            self.send(json.dumps(right).encode())

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Not to the terminal."""


Fault = Callable[[Handler, Any], None]


def says(content: bytes | str | object, status: int = 200, **headers: str) -> Fault:
    """A fault that answers with this text, bytes or JSON, whatever it was asked."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    return lambda handler, right: handler.send(content, status, **headers)


@contextmanager
def running(answers: Callable[[str, Answer], Any]) -> Iterator[Attacked]:
    """A server in a thread, which ends with the block."""
    with Attacked(answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.stopped.set()
            server.shutdown()


# A well teacher.


def true_log_prob(token: int, before: int) -> float:
    """What the well server gives."""
    return -0.1 - ((7 * token + 3 * before) % 20) / 10


def teacher_answer(path: str, body: Answer) -> Any:
    if path == "/v1/models":
        return {"data": [{"id": "teacher", "max_model_len": 100}]}
    ids = body["prompt"]
    entries = [
        {str(token): {"logprob": true_log_prob(token, before), "rank": 1}}
        for before, token in pairwise(ids)
    ]
    choice = {"index": 0, "prompt_logprobs": [None, *entries], "prompt_token_ids": ids}
    return {"object": "text_completion", "model": body["model"], "choices": [choice]}


def connect(server: Attacked, concurrency: int = 2) -> ServerTeacher:
    return ServerTeacher(
        TeacherConfig(
            model="teacher",
            servers=[server.url],
            timeout=TIMEOUT,
            patience=PATIENCE,
            concurrency=concurrency,
            api_key_env="ATTACKED_KEY",
        )
    )


def some_examples() -> list[Example]:
    made = [
        make_example(
            make_rollout(i, [4 + i, 5], [10 + i, 11, 12, 2], stopped=True), [2], [2], "raw"
        )
        for i in range(3)
    ]
    return [example for example in made if example is not None]


def right_scores(example: Example) -> torch.Tensor:
    ids = [*example.prompt.teacher_prompt_ids, *example.rollout.completion_ids]
    first = len(example.prompt.teacher_prompt_ids)
    return torch.tensor([true_log_prob(ids[i], ids[i - 1]) for i in range(first, len(ids))])


def assert_right_scores(teacher: ServerTeacher) -> None:
    for example in base.score(teacher, some_examples()):
        torch.testing.assert_close(example.teacher_log_probs, right_scores(example))


def assert_one_line_without_key(texts: list[str]) -> None:
    for text in texts:
        assert text == one_line(text)
        assert len(text) < 1000
        for first in range(len(KEY) - net.SHOWN_OF_KEY):
            assert KEY[first : first + net.SHOWN_OF_KEY + 1] not in text


def assert_right_or_one_line(
    attempt: Callable[[], object], caplog: pytest.LogCaptureFixture, must_fail: bool
) -> None:
    lines = []
    try:
        attempt()
        assert not must_fail, "a server that stays wrong ends a run"
    except (RunError, UsageError) as error:
        lines = [str(error)]
    assert_one_line_without_key(lines + [record.getMessage() for record in caplog.records])


# A well rollout server.

STOP, LONGEST = 2, 4
SAMPLING = Sampling(LONGEST, (STOP,))


class Sampler:
    """A well rollout server: what it samples is a function of the prompt."""

    def __init__(self) -> None:
        self.version = "default"

    def __call__(self, path: str, body: Answer) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "student", "max_model_len": 100}]}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path != "/v1/completions":
            return {}
        ids = completion_of(body["prompt"])
        log_probs = {"token_logprobs": log_probs_of(ids)}
        choice = {"token_ids": ids, "logprobs": log_probs, "finish_reason": "stop"}
        return {"choices": [choice]}


def completion_of(prompt: list[int]) -> list[int]:
    return [prompt[0] + 5, 11, STOP]


def log_probs_of(ids: list[int]) -> list[float]:
    return [true_log_prob(token, 0) for token in ids]


def connect_engine(server: Attacked, folder: Path) -> CheckedEngine:
    options: dict[str, Any] = {"timeout": TIMEOUT, "patience": PATIENCE}
    client = JsonClient("rollout.server.url", server.url, api_key_env="ATTACKED_KEY", **options)
    engine = VllmServerEngine(client, lambda: [("head", torch.ones(2))], folder, 2, VOCAB)
    return CheckedEngine(engine, "vllm_server", VOCAB, 100)


def assert_right_rollouts(engine: CheckedEngine) -> None:
    requests = [make_request(i, [4 + i, 5]) for i in range(3)]
    for rollout in engine.generate(requests, SAMPLING):
        assert rollout.completion_ids == completion_of(rollout.prompt_ids)
        assert rollout.sampling_log_probs == pytest.approx(log_probs_of(rollout.completion_ids))
        assert rollout.stopped
