"""A rollout server's bad answers, from a real HTTP server on loopback that gives them in turn."""

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import make_request

from poweropd import Config, net
from poweropd.errors import RunError, UsageError
from poweropd.net import JsonClient, Transient
from poweropd.rollouts.base import Sampling
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
        self.headers: dict[str, str] = {}  # of every answer
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
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with Scripted() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "FIRST_DELAY", 0.01)


def client(url: str, timeout: float = 5, patience: float = 5, **options: Any) -> JsonClient:
    return JsonClient("rollout.server.url", url, timeout=timeout, patience=patience, **options)


def ask(server: JsonClient, path: str = "/v1/completions") -> Any:
    """Posts to the server until it answers, or its patience is out."""
    return net.wait(server.patiently(lambda: server.request("POST", path, {})))


def test_what_may_pass_is_asked_again(scripted: Scripted) -> None:
    scripted.answers = [(0, None), (500, {}), (429, {}), (503, {}), (408, {}), (200, b"<html>")]
    scripted.answers.append((200, {"ids": [1]}))
    assert ask(client(scripted.url)) == {"ids": [1]}
    assert scripted.answers == []


@pytest.mark.parametrize(
    ("answer", "path", "message"),
    [
        ((400, {"error": "context is 512"}), "/v1/completions", "HTTP 400: .*context is 512"),
        ((401, {}), "/v1/completions", "HTTP 401"),
        ((404, {}), "/weight_info", "HTTP 404: .*; start vLLM with VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_refusal_is_not_asked_again(
    scripted: Scripted, answer: tuple[int, Any], path: str, message: str
) -> None:
    scripted.answers = [answer]
    server = client(scripted.url, not_found="start vLLM with VLLM_SERVER_DEV_MODE=1")
    with pytest.raises(RunError, match=message) as raised:
        ask(server, path)
    assert scripted.url in str(raised.value)


def test_patience_ends_with_the_url_and_what_to_do(scripted: Scripted) -> None:
    scripted.answers = [(500, {"error": "engine is dead"})] * 100
    message = (
        rf"rollout server {scripted.url}: HTTP 500: .*engine is dead.*, for 0.2 seconds "
        r"\(rollout.server.patience\): .*start it again .* or correct rollout.server.url"
    )
    with pytest.raises(RunError, match=message):
        ask(client(scripted.url, patience=0.2))


def test_a_slow_answer_is_a_transient_failure(scripted: Scripted) -> None:
    scripted.shutdown()  # nobody accepts: the connection waits in the queue
    server = client(scripted.url, timeout=0.1)
    with pytest.raises(Transient, match=r"no answer within rollout.server.timeout=0.1 seconds"):
        net.wait(server.request("POST", "/v1/completions", {}))


@pytest.mark.parametrize(("asked", "patience", "least"), [("0.3", 5, 0.3), ("60", 0.3, 0.3)])
def test_a_server_is_left_alone_as_long_as_it_asks_for_within_patience(
    scripted: Scripted, asked: str, patience: float, least: float
) -> None:
    scripted.headers = {"Retry-After": asked}
    scripted.answers = [(429, {}), (200, {"ids": [1]})]
    begun = time.monotonic()
    assert ask(client(scripted.url, patience=patience)) == {"ids": [1]}
    assert least <= time.monotonic() - begun < 10


def test_the_key_comes_from_the_environment(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match=r"api_key_env: .* ROLLOUT_KEY, which is not set"):
        client(scripted.url, api_key_env="ROLLOUT_KEY")
    monkeypatch.setenv("ROLLOUT_KEY", "ключ")
    with pytest.raises(UsageError, match="ROLLOUT_KEY, which is not plain text"):
        client(scripted.url, api_key_env="ROLLOUT_KEY")
    monkeypatch.setenv("ROLLOUT_KEY", "secret")
    scripted.answers = [(500, {"no": "Bearer secret"}), (401, {"bad": "Bearer secret"})]
    with pytest.raises(RunError, match=r"HTTP 401: .*Bearer \[key\].*api_key_env") as raised:
        ask(client(scripted.url, api_key_env="ROLLOUT_KEY"))
    assert scripted.keys == ["Bearer secret"] * 2
    assert "trying again" in caplog.text
    assert "secret" not in str(raised.value) + caplog.text


def engine(scripted: Scripted, folder: Path) -> VllmServerEngine:
    scripted.answers.insert(0, (200, {"data": [{"id": "student"}]}))
    return VllmServerEngine(
        client(f"{scripted.url}/v1/"),
        lambda: [("head", torch.ones(2))],
        folder,
        1,
        8,
    )


@pytest.mark.parametrize("body", [{"object": "list"}, {"data": []}, {"data": [{}]}, [], None])
def test_what_lists_no_models_is_not_a_vllm_server(
    scripted: Scripted, tmp_path: Path, body: Any
) -> None:
    scripted.answers = [(200, body)]
    with pytest.raises(UsageError, match=rf"rollout.server.url: {scripted.url} is not a vLLM"):
        VllmServerEngine(client(scripted.url), lambda: [], tmp_path, 1, 8)


def test_malformed_answers_are_asked_for_again(scripted: Scripted, tmp_path: Path) -> None:
    sampler = engine(scripted, tmp_path)
    sampler.server.version = "v"
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
    assert found == {first.server.target, second.server.target} == set(tmp_path.glob("*/*"))
    other = engine(scripted, tmp_path)  # of another process of the first run
    other.is_main = False
    scripted.answers = [(200, {"weight_version": first.server.version})]
    other.sync()
    assert other.server.target == first.server.target
    kept = second.server.target
    del second, one
    assert not kept.exists()
    assert first.server.target.exists()


@pytest.mark.parametrize(
    "url",
    ["h:1", "http://", "http://h:port", "http://[::1", "http://me:secret@h", "http://h?k=secret"],
)
def test_addresses_are_checked_in_the_recipe(url: str) -> None:
    tree = {"model": {"student": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "p"}}
    with pytest.raises(UsageError, match=r"rollout.server.url: expected a base URL") as refused:
        Config.from_dict({**tree, "rollout": {"server": {"url": url}}})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-0.5, -0.5),
        (0, 0.0),
        (-3, -3.0),
        (0.0005, 0.0),
        (-9999.0, -float("inf")),
        (-9998.5, -9998.5),
    ],
)
def test_log_probs_are_read(value: float, expected: float) -> None:
    assert net.read_log_prob(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, "-0.5", [-0.5], {}, 0.01, math.nan, math.inf, -math.inf),
        *(-1e300, -9999.5, 10**400, -(10**400)),
    ],
)
def test_what_is_no_log_prob_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="expected a log-prob"):
        net.read_log_prob(value)


def test_a_key_and_its_parts_are_masked_and_other_text_is_not() -> None:
    key = "sk-Sesame0pen-4711"
    for part in (key, key[:8], key[-7:], key[4:12]):
        assert net.masked(f"key {part}.", key) == "key [key]."
    assert net.masked("-Sesa, seasons and 4711", key) == "-Sesa, seasons and 4711"
    assert net.masked("abc abcd", "abc") == "[key] [key]d"


def test_an_answer_without_end_is_given_up(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net, "MAX_ANSWER_BYTES", 1000)
    scripted.answers = [(200, b"[" + b" " * 999 + b"]"), (200, b"[" + b" " * 998 + b"]")]
    server = client(scripted.url)
    with pytest.raises(Transient, match="an answer of more than 1000 bytes from /x"):
        net.wait(server.request("POST", "/x", {}))
    assert net.wait(server.request("POST", "/x", {})) == []
