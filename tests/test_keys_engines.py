"""Keys of the rollout engines and of the evaluation do what the reference says of them."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
from rollout_cases import make_request

from poweropd import Config, Trainer, net
from poweropd.errors import RunError
from poweropd.grading.grader import Grade
from poweropd.rollouts import vllm
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.guards import VerifiedEngine
from poweropd.rollouts.vllm_server import VllmServerEngine
from poweropd.training.validation import load_problem_sets

MAKES = Callable[..., Config]


# The engine in this process.


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, {"gpu_memory_utilization": 0.3, "enforce_eager": True}),
        ({"gpu_memory_utilization": 0.7}, {"gpu_memory_utilization": 0.7}),
        ({"max_model_len": 99}, {"max_model_len": 99}),
        ({"enforce_eager": False}, {"enforce_eager": False}),
        ({"block_size": 8}, {"block_size": 8}),
    ],
)
def test_vllm_is_started_as_said(
    recipe: MAKES,
    monkeypatch: pytest.MonkeyPatch,
    section: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    trainer = Trainer(recipe(), progress=False)
    monkeypatch.setattr(vllm._process, "llm_for", lambda engine: None)
    config = recipe(**{"rollout.engine": "vllm", "rollout.vllm": section})
    engine = vllm.VllmEngine.build(trainer.student, config, trainer.accelerator, longest=40)
    assert engine.options.items() >= {"max_model_len": 40, **expected}.items()


# The engine on a server.


class Server(ThreadingHTTPServer):
    """Answers as a vLLM server does that samples id 7; `delay` is of completions, in seconds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.version, self.weights, self.delay = "default", "", 0.0
        self.keys: set[str | None] = set()
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def completion(self) -> Any:
        with self.lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        time.sleep(self.delay)
        with self.lock:
            self.in_flight -= 1
        log_probs = {"token_logprobs": [-1.0]}
        return {"choices": [{"token_ids": [7], "logprobs": log_probs, "finish_reason": "stop"}]}

    def answer(self, path: str, body: Any) -> Any:
        if path == "/v1/completions":
            return self.completion()
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/collective_rpc":
            self.weights = body["kwargs"].get("weights_path", self.weights)
        models = {"data": [{"id": "student", "max_model_len": 100}]}
        known = {"/v1/models": models, "/weight_info": {"weight_version": self.version}}
        return known.get(path, {})


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send(self.server.answer(self.path, None))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send(self.server.answer(self.path, json.loads(body)))

    def send(self, answer: Any) -> None:
        self.server.keys.add(self.headers["Authorization"])
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(net, "FIRST_DELAY", 0.02)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def connected(recipe: MAKES, server: Server) -> Callable[..., VllmServerEngine]:
    """Makes an engine on the server; the arguments are keys of `rollout.server`."""
    trainer = Trainer(recipe(), progress=False)

    def make(**section: Any) -> VllmServerEngine:
        section = {"url": server.url, **section}
        config = recipe(**{"rollout.engine": "vllm_server", "rollout.server": section})
        engine = VllmServerEngine.build(trainer.student, config, trainer.accelerator, longest=40)
        engine.sync()
        return engine

    return make


def sample(engine: VllmServerEngine, count: int) -> list[list[int]]:
    requests = [make_request(i, [1, 2]) for i in range(count)]
    return [rollout.completion_ids for rollout in engine.generate(requests, Sampling(4, (7,)))]


def test_the_server_and_its_weights_are_where_it_is_said(
    connected: Callable[..., VllmServerEngine], server: Server, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    for folder, section in ((tmp_path / "run", {}), (own, {"weights_dir": str(own)})):
        engine = connected(**section)
        assert sample(engine, 1) == [[7]]
        assert Path(server.weights).is_relative_to(folder)
        assert Path(server.weights, "model.safetensors").is_file()


def test_a_server_is_asked_for_so_many_completions_at_once(
    connected: Callable[..., VllmServerEngine], server: Server
) -> None:
    engine = connected(concurrency=3)
    server.delay = 0.1
    assert sample(engine, 9) == [[7]] * 9
    assert server.most_in_flight == 3


def test_a_completion_has_so_much_time_and_the_server_so_much_patience(
    connected: Callable[..., VllmServerEngine], server: Server
) -> None:
    engine = connected(timeout=0.3, patience=0.5)
    server.delay = 2.0
    message = r"no answer within rollout.server.timeout=0.3 seconds, for 0.5 seconds"
    with pytest.raises(RunError, match=message):
        sample(engine, 1)


def test_the_key_of_the_server_is_sent(
    connected: Callable[..., VllmServerEngine], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMPLER_KEY", "sesame")
    sample(connected(api_key_env="SAMPLER_KEY"), 1)
    assert server.keys == {"Bearer sesame"}


def test_weights_are_compared_so_often(
    recipe: MAKES, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []
    monkeypatch.setattr(VerifiedEngine, "verify", lambda engine: syncs.append(engine.syncs))
    keys = {"rollout.engine": "vllm_server", "rollout.server": {"url": server.url}}
    trainer = Trainer(recipe(**keys, **{"rollout.verify_every": 3}), progress=False)
    for _ in range(6):
        trainer.engine.sync()
    assert syncs == [0, 3, 6]  # the first is that of the start


# The evaluation.


class Quick:
    """Stands for the grader, whose processes take a while to start."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, gold: str, completion: str, rule: object) -> "Future[Grade]":
        done = Future[Grade]()
        done.set_result(Grade(False, None, "wrong"))
        return done


@pytest.fixture
def evaluated(
    recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Evaluates the student; the arguments are keys of `evaluate`. Returns the rows."""
    monkeypatch.setattr("poweropd.evaluation.runner.Grader", Quick)
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    problems = [{"id": i, "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(5)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    number = iter(range(100))

    def make(**section: Any) -> list[dict[str, Any]]:
        own = {"every": 1, "benchmarks": ["sums"], "data_dir": str(folder), "max_new_tokens": 6}
        keys = {"evaluate": {**own, **section}, "run.dir": str(tmp_path / f"run-{next(number)}")}
        trainer = Trainer(recipe(**keys), progress=False)
        assert trainer.validation is not None
        trainer.validation.evaluate(trainer.subject(), 0, None)
        text = (trainer.run.path / "eval" / "step-0" / "sums.jsonl").read_text()
        return sorted(map(json.loads, text.splitlines()), key=lambda r: (r["id"], r["sample"]))

    return make


def test_problems_and_completions_of_an_evaluation(
    evaluated: Callable[..., list[dict[str, Any]]],
) -> None:
    rows = evaluated(n=2, limit=3, max_new_tokens=4)
    assert [(row["id"], row["sample"]) for row in rows] == [
        (str(problem), sample) for problem in range(3) for sample in range(2)
    ]
    assert max(row["tokens"] for row in rows) == 4
    assert len({row["completion"] for row in rows if row["id"] == "0"}) == 2


def test_an_evaluation_samples_as_said(evaluated: Callable[..., list[dict[str, Any]]]) -> None:
    def sampled(**keys: Any) -> list[str]:
        every = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12}
        return [row["completion"] for row in evaluated(**{**every, **keys})]

    free, greedy = sampled(), sampled(temperature=0.0)
    assert free != greedy
    assert sampled(top_k=1) == greedy
    assert sampled(top_p=1e-6) == greedy
    assert sampled(temperature=1e-4) == greedy


@pytest.mark.parametrize(
    ("best", "expected"), [("avg_at_k", [True, False]), ("mean_length", [True, True])]
)
def test_the_best_student_is_that_of_the_named_metric(
    recipe: MAKES, best: str, expected: list[bool]
) -> None:
    """The second one is wrong more often, in shorter completions."""
    section = {"every": 1, "benchmarks": ["embedded"], "limit": 2, "best": best}
    validation = Trainer(recipe(**{"evaluate": section}), progress=False).validation
    assert validation is not None
    found = [
        validation.is_best({"eval/embedded/avg_at_k": a, "eval/embedded/mean_length": b}, step)
        for step, (a, b) in enumerate([(0.5, 90.0), (0.4, 20.0)])
    ]
    assert found == expected


def test_a_benchmark_of_the_hub_is_the_described_one(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, config, split))
        rows = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(5)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    described = {"dataset": "someone/sums", "config": "small", "split": "dev", "limit": 2}
    for own in (described, {"dataset": "someone/sums"}):
        section = {"every": 1, "benchmarks": [own]}
        config = recipe(**{"evaluate": section})
        (found,) = load_problem_sets(config.evaluate, config).values()
        assert len(found.problems) == own.get("limit", 5)
    assert asked == [("someone/sums", "small", "dev"), ("someone/sums", None, "test")]


def even(row: object, completion: str) -> float:
    return 1.0 - len(completion) % 2


def test_completions_are_graded_as_said(evaluated: Callable[..., list[dict[str, Any]]]) -> None:
    rows = evaluated(grader=f"{__name__}:even", n=4)
    scores = [row["score"] for row in rows]
    assert scores == [even(None, row["completion"]) for row in rows]
    assert set(scores) == {0.0, 1.0}
