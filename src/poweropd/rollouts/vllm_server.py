"""Sampling from a vLLM server: token ids over HTTP, weights through a directory that both see.

The server needs vLLM's development routers (`VLLM_SERVER_DEV_MODE=1`): they load weights, clear the
prefix cache and keep a version of the weights. The version tells the server that was synced from
one that was restarted since, or that another run has written to.
"""

import shutil
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from poweropd.data.rollout import Request, Rollout
from poweropd.errors import RunError, UsageError
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.http import JsonServer, Unavailable

FIRST_VERSION = "default"  # of a server that has been told nothing since its start
MALFORMED = (KeyError, IndexError, TypeError, ValueError)  # what reading a bad answer raises


class VllmServerEngine:
    """`weights()` yields the student's weights as `rollouts.vllm.VllmEngine` takes them.

    The main process writes them to a folder of the run's own in `folder`, which goes when the
    engine does, and tells the server; `wait()` is a barrier of all processes, each of which samples
    its own requests, `concurrency` at once. A server that was restarted is given the weights again.
    Raises UsageError where there is no vLLM server; RunError where it stays away, holds another
    run's weights, or refuses something.
    """

    concurrent = True

    def __init__(
        self,
        server: JsonServer,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        folder: Path,
        concurrency: int,
        is_main: bool = True,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.server, self.weights, self.concurrency = server, weights, concurrency
        self.is_main, self.wait = is_main, wait
        self.folder = folder.absolute()
        self.run = uuid.uuid4().hex
        self.syncs = 0
        if is_main:
            weakref.finalize(self, shutil.rmtree, self.folder / self.run, ignore_errors=True)
        try:
            self.model = server.get("/v1/models")["data"][0]["id"]
        except Unavailable as error:
            raise UsageError(
                f"rollout.server.url: no vLLM server answers at {server.url} ({error}); start one: "
                "VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT"
            ) from None
        except MALFORMED as error:
            raise UsageError(
                f"rollout.server.url: {server.url} is not a vLLM server: it lists no models "
                f"({error!r})"
            ) from None

    def sync(self) -> None:
        self.syncs += 1
        # Gathering is collective: every process goes through the weights, one keeps them.
        found = ((name, tensor.detach()) for name, tensor in self.weights())
        if self.is_main:
            self.version = f"{self.run}/sync-{self.syncs}"
            self._write({name: tensor.to("cpu", copy=True) for name, tensor in found})
            self.server.patiently(lambda: self._load("wait"))
            for old in self.target.parent.glob("sync-*"):
                if old != self.target:
                    shutil.rmtree(old)
        else:
            for _ in found:
                pass
        self.wait()
        if not self.is_main:
            self.version = self.server.patiently(self._current_version)
        self.wait()

    @property
    def target(self) -> Path:
        """Where the weights of the last sync are; every process knows it by their version."""
        return self.folder / self.version

    def _write(self, weights: dict[str, Tensor]) -> None:
        temporary = self.target.with_name(f".tmp-{self.target.name}")
        temporary.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary / "model.safetensors")
        temporary.rename(self.target)

    def _load(self, in_flight: str) -> None:
        """The weights of the last sync into the server, as one version.

        What is being sampled meanwhile is awaited ("wait") or given up ("abort").
        """
        post = self.server.post
        post("/pause", {}, mode=in_flight)
        # A server that was started without weights would go on refusing to read any.
        overrides = {"load_config": {"load_format": "auto"}}
        self._call_workers("update_config", {"overrides": overrides})
        self._call_workers("reload_weights", {"weights_path": str(self.target)})
        post("/reset_prefix_cache", {})
        post("/update_weight_version", {"new_version": self.version})
        post("/resume", {})

    def _call_workers(self, method: str, arguments: dict[str, Any]) -> None:
        try:
            self.server.post("/collective_rpc", {"method": method, "kwargs": arguments})
        except Unavailable as error:
            if not self.server.is_healthy():
                raise
            raise RunError(
                f"{self.server.url}: {method} failed ({error}): the server must serve the "
                f"student's architecture and see {self.target} under that path; start it again. "
                "If the student's embeddings have more rows than the teacher's, start it with "
                """--hf-overrides '{"vocab_size": ROWS_OF_THE_SMALLER}' --load-format dummy"""
            ) from None

    def _current_version(self) -> str:
        try:
            return str(self.server.get("/weight_info")["weight_version"])
        except MALFORMED as error:
            raise Unavailable(f"/weight_info without a version ({error!r})") from error

    def _check_version(self) -> None:
        """Raises Unavailable where the server was restarted, once it has the weights again."""
        version = self._current_version()
        if version == self.version:
            return
        if version != FIRST_VERSION:
            raise RunError(
                f"{self.server.url}: another run has given this server its weights (version "
                f"{version}): a rollout server serves one run; start another one"
            )
        self._load("abort")
        raise Unavailable("it was restarted; it has been given the weights again")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = [pool.submit(self._rollout, request, sampling) for request in requests]
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _rollout(self, request: Request, sampling: Sampling) -> Rollout:
        ids, log_probs = self.server.patiently(lambda: self._complete(request, sampling))
        return request.rollout(ids, log_probs, ids[-1] in sampling.stop_ids)

    def _complete(self, request: Request, sampling: Sampling) -> tuple[list[int], list[float]]:
        """Ids and log-probs of a whole completion by the weights of the last sync."""
        # Before and after: the server may be restarted at any moment.
        self._check_version()
        body = _completion_body(self.model, request, sampling)
        answer = self.server.post("/v1/completions", body)
        self._check_version()
        try:
            return _read_completion(answer, sampling)
        except MALFORMED as error:
            raise Unavailable(f"an answer that is no completion ({error!r})") from error


def _read_completion(answer: Any, sampling: Sampling) -> tuple[list[int], list[float]]:
    (choice,) = answer["choices"]
    ids, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    complete = (
        ids[-1:] and ids[-1] in sampling.stop_ids
        if choice["finish_reason"] == "stop"
        else len(ids) == sampling.max_new_tokens
    )
    if not complete or len(log_probs) != len(ids) or None in log_probs:
        raise Unavailable(
            f"a completion of {len(ids)} tokens and {len(log_probs)} log-probs ended early "
            f"({choice['finish_reason']})"
        )
    return ids, log_probs


def _completion_body(model: str, request: Request, sampling: Sampling) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": request.prompt_ids,
        "seed": request.seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        # The rest is said, too: a model's generation_config.json sets the server's defaults.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        # Ours are all the stop ids there are: not the model's own besides.
        "ignore_eos": True,
        "stop_token_ids": list(sampling.stop_ids),
        "logprobs": 0,  # of the sampled token: raw, at temperature 1
        "return_token_ids": True,
    }
