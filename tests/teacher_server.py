"""An HTTP server on loopback that scores and samples as vLLM does, with a model of transformers,
and that can be told to misbehave.
"""

import json
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM

from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Request
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.transformers import TransformersEngine

NAME = "teacher"


class Handler(BaseHTTPRequestHandler):
    """Two of vLLM's routes, with POST for all that is asked of the model."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # two small writes would wait for an acknowledgement
    server: "HttpServer"

    def do_GET(self) -> None:
        card = {"id": self.server.owner.name, "max_model_len": self.server.owner.context}
        self.answer(200, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if owner.stopped.is_set():
            self.close_connection = True
            return
        with owner.lock:
            owner.requests.append(owner.ids_of(body))
            owner.headers.append(dict(self.headers))
            owner.connections.add(self.client_address)
            fault = owner.faults.pop(0) if owner.faults else None
            owner.in_flight += 1
            owner.most_in_flight = max(owner.most_in_flight, owner.in_flight)
        owner.arrived.set()
        if owner.gate is not None:
            owner.gate.wait(10)
        if (refusal := owner.refusal(body)) is not None:
            self.answer(refusal[0], {"error": {"message": refusal[1]}})
        else:
            answer = owner.respond(body)
            (fault or Handler.answer)(self, 200, answer)
        with owner.lock:
            owner.in_flight -= 1

    def answer(self, status: int, body: Any, **headers: str) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Not to the terminal."""


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    owner: "TeacherServer"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news; anything else is a mistake in this file."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


# Ways to misbehave, once each: (handler, status, the right answer) -> None.
Fault = Callable[[Handler, int, Any], None]


def one_token_too_few(handler: Handler, status: int, body: Any) -> None:
    del body["choices"][0]["prompt_logprobs"][-1]
    handler.answer(status, body)


def another_token(handler: Handler, status: int, body: Any) -> None:
    entries = body["choices"][0]["prompt_logprobs"]
    entries[-1] = {str(int(next(iter(entries[-1]))) + 1): next(iter(entries[-1].values()))}
    handler.answer(status, body)


def another_prompt(handler: Handler, status: int, body: Any) -> None:
    body["choices"][0]["prompt_token_ids"][0] += 1
    handler.answer(status, body)


def no_number(handler: Handler, status: int, body: Any) -> None:
    next(iter(body["choices"][0]["prompt_logprobs"][-1].values()))["logprob"] = float("-inf")
    handler.answer(status, body)


def no_choice(handler: Handler, status: int, body: Any) -> None:
    handler.answer(status, {"choices": []})


def error_500(handler: Handler, status: int, body: Any) -> None:
    handler.answer(500, {"error": {"message": "EngineCore died"}})


def busy_429(handler: Handler, status: int, body: Any) -> None:
    handler.answer(429, {"error": {"message": "slow down"}}, Retry_After="1")


def echoing_401(handler: Handler, status: int, body: Any) -> None:
    handler.answer(401, {"error": {"message": f"bad key: {handler.headers['Authorization']}"}})


def early_close(handler: Handler, status: int, body: Any) -> None:
    handler.close_connection = True


def half_an_answer(handler: Handler, status: int, body: Any) -> None:
    content = json.dumps(body).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def hanging(handler: Handler, status: int, body: Any) -> None:
    """Answers when the client has long given up."""
    handler.server.owner.stopped.wait()
    handler.close_connection = True


def a_short_list(handler: Handler, status: int, body: Any) -> None:
    """Of the last token, none but itself."""
    (choice,) = body["choices"]
    own = str(choice["prompt_token_ids"][-1])
    choice["prompt_logprobs"][-1] = {own: choice["prompt_logprobs"][-1][own]}
    handler.answer(status, body)


FAULTS: list[Fault] = [
    *(one_token_too_few, another_token, another_prompt, no_number, no_choice, error_500, busy_429),
    *(early_close, half_an_answer, hanging),
]


class TeacherServer:
    """Scores with the model in a directory; `faults` are taken by the next requests, in order."""

    handler = Handler

    def __init__(self, model: Path, context: int = 256) -> None:
        self.name, self.context = NAME, context
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.vocab_size = self.model.config.vocab_size
        self.lock, self.arrived = threading.Lock(), threading.Event()
        self.stopped = threading.Event()
        self.gate: threading.Event | None = None  # answers wait for it
        self.in_flight = self.most_in_flight = 0
        self.requests: list[list[int]] = []
        self.headers: list[dict[str, str]] = []
        self.connections: set[Any] = set()
        self.faults: list[Fault] = []
        self.shift = 0.0  # of every log-prob: another model
        self.stale = 0.0  # of what comes from a prefix cache
        self.most_told = 20  # ids of a context
        self.clips = False  # whether it gives as many if more are asked for
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = int(listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.stopped.clear()
        self.http = HttpServer(("127.0.0.1", self.port), self.handler)
        self.http.owner = self
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more; what is connected is cut off at its next request."""
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()

    def ids_of(self, body: dict[str, Any]) -> list[int]:
        """What is asked about."""
        return body["prompt"]

    def top_of(self, body: dict[str, Any]) -> int:
        """How many ids of a context are asked for."""
        return body.get("prompt_logprobs") or 0

    def refusal(self, body: dict[str, Any]) -> tuple[int, str] | None:
        """Status and message of a request that is refused."""
        ids = self.ids_of(body)
        if body.get("model", self.name) != self.name:
            return 404, "The model does not exist."
        if isinstance(ids[0], list):
            return None
        if max(ids) >= self.vocab_size:
            return 400, "Token id is out of vocabulary"
        if len(ids) >= self.context:
            return 400, "max_tokens must be at least 1, got 0."
        if self.top_of(body) > self.most_told and not self.clips:
            return 400, f"Requested more prompt logprobs than max allowed: {self.most_told}"
        return None

    def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        if isinstance(body["prompt"][0], list):  # several prompts, as TRL sends them
            return self.completions(body)
        return self.completion(body) if body["max_tokens"] == 1 else self.sampled(body)

    @torch.inference_mode()
    def log_probs(self, ids: list[int], fresh: bool = True) -> torch.Tensor:
        """Of the next token after each id, [n, V]."""
        with self.lock:
            found = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return found + self.shift + (0.0 if fresh else self.stale)

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        """Several completions, one for each prompt."""
        found = [self.completion({**body, "prompt": ids}) for ids in body["prompt"]]
        choices = [{**one["choices"][0], "index": i} for i, one in enumerate(found)]
        return {**found[0], "choices": choices}

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """The log-probs of the prompt's tokens, and of the most probable ones if they are asked."""
        ids, others = body["prompt"], min(body["prompt_logprobs"], self.most_told)
        log_probs = self.log_probs(ids, fresh="cache_salt" in body)
        entries = []
        for token, row in zip(ids[1:], log_probs, strict=False):
            told = {*row.topk(others).indices.tolist(), token}
            entries.append({str(i): self._entry(row, i) for i in sorted(told)})
        choice = {"index": 0, "prompt_logprobs": [None, *entries], "prompt_token_ids": list(ids)}
        return {"object": "text_completion", "model": self.name, "choices": [choice]}

    def _entry(self, row: torch.Tensor, token: int) -> dict[str, Any]:
        rank = int((row > row[token]).sum()) + 1
        return {"logprob": row[token].item(), "rank": rank, "decoded_token": ""}

    def sampled(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion, as the transformers engine samples it with these settings."""
        prompt, stops = body["prompt"], body["stop_token_ids"]
        engine = TransformersEngine(self.model, vocab_size=self.vocab_size)
        request = Request(Prompt(0, prompt, prompt), 0, 0, body["seed"])
        settings = {name: body[name] for name in ("temperature", "top_p", "top_k")}
        with self.lock:
            (found,) = engine.generate([request], Sampling(body["max_tokens"], stops, **settings))
        choice = {
            "index": 0,
            "token_ids": found.completion_ids,
            "logprobs": {"token_logprobs": found.sampling_log_probs},
            "finish_reason": "stop" if found.stopped else "length",
        }
        return {"object": "text_completion", "model": self.name, "choices": [choice]}
