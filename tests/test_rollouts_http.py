"""A rollout server's bad answers, from a real HTTP server on loopback that gives them in turn."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from poweropd.errors import RunError, UsageError
from poweropd.rollouts import http
from poweropd.rollouts.http import Server, Unavailable


class Scripted(ThreadingHTTPServer):
    """Gives `answers`, (status, body), one a request; a status of 0 drops the connection."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, Any]] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.keys.append(self.headers["Authorization"])
        status, body = self.server.answers.pop(0)
        if status == 0:
            self.close_connection = True
            return
        content = json.dumps(body).encode()
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
    scripted.answers = [(0, None), (500, {}), (429, {}), (503, {}), (200, {"ids": [1]})]
    server = Server(scripted.url, timeout=5, patience=5)
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
    server = Server(scripted.url, timeout=5, patience=5)
    with pytest.raises(RunError, match=message) as raised:
        server.patiently(lambda: server.post(path, {}))
    assert scripted.url in str(raised.value)


def test_patience_ends_with_the_url_and_what_to_do(scripted: Scripted) -> None:
    scripted.answers = [(500, {"error": "engine is dead"})] * 100
    server = Server(scripted.url, timeout=5, patience=0.2)
    with pytest.raises(RunError, match=r"no good answer .*engine is dead.*start the server again"):
        server.patiently(lambda: server.post("/v1/completions", {}))


def test_a_slow_answer_is_unavailable(scripted: Scripted) -> None:
    scripted.shutdown()  # nobody accepts: the connection waits in the queue
    with pytest.raises(Unavailable, match="Timeout"):
        Server(scripted.url, timeout=0.1, patience=1).post("/v1/completions", {})


def test_the_key_comes_from_the_environment(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="api_key_env: ROLLOUT_KEY is not set"):
        Server(scripted.url, 1, 1, api_key_env="ROLLOUT_KEY")
    monkeypatch.setenv("ROLLOUT_KEY", "secret")
    scripted.answers = [(401, {})]
    with pytest.raises(RunError) as raised:
        Server(scripted.url, 1, 1, api_key_env="ROLLOUT_KEY").post("/v1/completions", {})
    assert scripted.keys == ["Bearer secret"]
    assert "secret" not in str(raised.value)
