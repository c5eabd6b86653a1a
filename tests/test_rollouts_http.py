"""A rollout server's bad answers, from a real HTTP server on loopback that gives them in turn."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import make_request

from poweropd import Config
from poweropd.errors import RunError, UsageError
from poweropd.rollouts import http
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.http import JsonServer, Unavailable
from poweropd.rollouts.vllm_server import VllmServerEngine


class Scripted(ThreadingHTTPServer):
    """Gives `answers`, (status, body), one a request; a status of 0 drops the connection.

    A body of bytes is sent as it is, anything else as JSON.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, Any]] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer()

    def answer(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        status, body = self.server.answers.pop(0)
        if status == 0:
            self.close_connection = True
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with Scripted() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE_SECONDS", 0.01)


def test_what_may_pass_is_asked_again(scripted: Scripted) -> None:
    scripted.answers = [(0, None), (500, {}), (429, {}), (503, {}), (408, {}), (200, b"<html>")]
    scripted.answers.append((200, {"ids": [1]}))
    server = JsonServer(scripted.url, timeout=5, patience=5)
    assert server.patiently(lambda: server.post("/v1/completions", {})) == {"ids": [1]}
    assert scripted.answers == []


@pytest.mark.parametrize(
    ("answer", "path", "message"),
    [
        ((400, {"error": "context is 512"}), "/v1/completions", "HTTP 400: .*context is 512"),
        ((401, {}), "/v1/completions", "HTTP 401"),
        ((404, {}), "/weight_info", "not found: start vLLM with VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_refusal_is_not_asked_again(
    scripted: Scripted, answer: tuple[int, Any], path: str, message: str
) -> None:
    scripted.answers = [answer]
    server = JsonServer(scripted.url, timeout=5, patience=5)
    with pytest.raises(RunError, match=message) as raised:
        server.patiently(lambda: server.post(path, {}))
    assert scripted.url in str(raised.value)


def test_patience_ends_with_the_url_and_what_to_do(scripted: Scripted) -> None:
    scripted.answers = [(500, {"error": "engine is dead"})] * 100
    server = JsonServer(scripted.url, timeout=5, patience=0.2)
    with pytest.raises(RunError, match=r"no good answer .*engine is dead.*start the server again"):
        server.patiently(lambda: server.post("/v1/completions", {}))


def test_a_slow_answer_is_unavailable(scripted: Scripted) -> None:
    scripted.shutdown()  # nobody accepts: the connection waits in the queue
    with pytest.raises(Unavailable, match="Timeout"):
        JsonServer(scripted.url, timeout=0.1, patience=1).post("/v1/completions", {})


def test_the_key_comes_from_the_environment(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"api_key_env: .* ROLLOUT_KEY, which is not set"):
        JsonServer(scripted.url, 1, 1, api_key_env="ROLLOUT_KEY")
    monkeypatch.setenv("ROLLOUT_KEY", "ключ")
    with pytest.raises(UsageError, match="ROLLOUT_KEY, which is not plain text"):
        JsonServer(scripted.url, 1, 1, api_key_env="ROLLOUT_KEY")
    monkeypatch.setenv("ROLLOUT_KEY", "secret")
    scripted.answers = [(401, {})]
    with pytest.raises(RunError) as raised:
        JsonServer(scripted.url, 1, 1, api_key_env="ROLLOUT_KEY").post("/v1/completions", {})
    assert scripted.keys == ["Bearer secret"]
    assert "secret" not in str(raised.value)


def engine(scripted: Scripted, folder: Path) -> VllmServerEngine:
    scripted.answers.insert(0, (200, {"data": [{"id": "student"}]}))
    return VllmServerEngine(
        JsonServer(f"{scripted.url}/v1/", timeout=5, patience=5),
        lambda: [("head", torch.ones(2))],
        folder,
        1,
    )


@pytest.mark.parametrize("body", [{"object": "list"}, {"data": []}, {"data": [{}]}, [], None])
def test_what_lists_no_models_is_not_a_vllm_server(
    scripted: Scripted, tmp_path: Path, body: Any
) -> None:
    scripted.answers = [(200, body)]
    with pytest.raises(UsageError, match=rf"rollout.server.url: {scripted.url} is not a vLLM"):
        VllmServerEngine(JsonServer(scripted.url, 5, 5), lambda: [], tmp_path, 1)


def test_malformed_answers_are_asked_for_again(scripted: Scripted, tmp_path: Path) -> None:
    sampler = engine(scripted, tmp_path)
    sampler.version = "v"
    version = (200, {"weight_version": "v"})
    choice = {"token_ids": [7, 2], "finish_reason": "stop"}
    whole = {**choice, "logprobs": {"token_logprobs": [-1.0, -0.5]}}
    scripted.answers = [(200, {}), (200, None)]  # no version
    for body in ({}, [], {"choices": []}, {"choices": [choice]}, {"choices": [{}]}):
        scripted.answers += [version, (200, body), version]
    scripted.answers += [version, (200, {"choices": [whole]}), version]
    (rollout,) = sampler.generate([make_request(0, [1])], Sampling(4, (2,)))
    assert rollout.completion_ids == [7, 2]
    assert rollout.sampling_log_probs == [-1.0, -0.5]
    assert scripted.answers == []


def test_runs_that_share_a_folder_keep_their_weights(scripted: Scripted, tmp_path: Path) -> None:
    first, second = engine(scripted, tmp_path), engine(scripted, tmp_path)
    scripted.answers = [(200, {})] * 6 * 3  # what a sync asks for
    for one in (first, second, first):
        one.sync()
    assert scripted.answers == []
    found = {path.parent for path in tmp_path.rglob("model.safetensors")}
    assert found == {first.target, second.target} == set(tmp_path.glob("*/*"))
    other = engine(scripted, tmp_path)  # of another process of the first run
    other.is_main = False
    scripted.answers = [(200, {"weight_version": first.version})]
    other.sync()
    assert other.target == first.target
    kept = second.target
    del second, one
    assert not kept.exists()
    assert first.target.exists()


@pytest.mark.parametrize(
    "url",
    ["h:1", "http://", "http://h:port", "http://[::1", "http://me:secret@h", "http://h?k=secret"],
)
def test_addresses_are_checked_in_the_recipe(url: str) -> None:
    tree = {"model": {"student": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "p"}}
    with pytest.raises(UsageError, match=r"rollout.server.url: expected a base URL") as refused:
        Config.from_dict({**tree, "rollout": {"server": {"url": url}}})
    assert "secret" not in str(refused.value)
