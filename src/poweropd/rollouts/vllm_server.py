"""Sampling from a vLLM server: token ids over HTTP, weights through a directory that both see.

The server needs vLLM's development routers (`VLLM_SERVER_DEV_MODE=1`): they load weights, clear the
prefix cache and keep a version of the weights. The version tells the server that was synced from
one that was restarted since, or that another run has written to.
"""

import asyncio
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from poweropd.config import Config
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import RunError, UsageError, shown
from poweropd.models.language_model import Student
from poweropd.net import Json, JsonClient, Transient, read_log_prob, reading, start, wait
from poweropd.rollouts.base import Sampling, Weights, shared_weights
from poweropd.rollouts.vllm import vllm_parameters

FIRST_VERSION = "default"  # of a server that has been told nothing since its start
Completion = tuple[list[int], list[float]]  # ids and log-probs


class StudentServer:
    """A vLLM server that samples by the weights in `folder / version`.

    At most `concurrency` completions are asked for at once. Its coroutines run in the event loop of
    all requests. `vocab_size` is that of the weights.
    """

    def __init__(
        self, client: JsonClient, model: str, folder: Path, concurrency: int, vocab_size: int
    ) -> None:
        self.client, self.model, self.folder, self.vocab_size = client, model, folder, vocab_size
        self.version = FIRST_VERSION  # of the last sync
        self._places = asyncio.Semaphore(concurrency)

    @property
    def target(self) -> Path:
        """Returns where the weights of the last sync are."""
        return self.folder / self.version

    async def load(self, in_flight: str) -> None:
        """Makes the server load the weights of the last sync, as one version.

        What it samples meanwhile is awaited if `in_flight` is "wait", given up if it is "abort".
        """
        post = partial(self.client.request, "POST")
        await post(f"/pause?mode={in_flight}", {})
        # A server that was started without weights would go on refusing to read any.
        overrides = {"load_config": {"load_format": "auto"}}
        await self._call_workers("update_config", {"overrides": overrides})
        await self._call_workers("reload_weights", {"weights_path": str(self.target)})
        await post("/reset_prefix_cache", {})
        await post("/update_weight_version", {"new_version": self.version})
        await post("/resume", {})

    async def _call_workers(self, method: str, arguments: dict[str, Json]) -> None:
        """Calls a method of vLLM's workers; raises RunError if a healthy server fails to."""
        call = {"method": method, "kwargs": arguments}
        try:
            await self.client.request("POST", "/collective_rpc", call)
        except Transient as error:
            await self.client.request("GET", "/health")  # raises as well if the server is away
            reason = self.client.in_a_line(str(error))
            raise RunError(
                f"{self.client.name}: {method} failed ({reason}): the server must serve the "
                f"student's architecture and see {self.target} under that path; start it again. "
                f"If the student's embeddings have more than {self.vocab_size} rows, which is what "
                "the models share, start it with --load-format dummy "
                f"""--hf-overrides '{{"vocab_size": {self.vocab_size}}}'"""
            ) from None

    async def current_version(self) -> str:
        """Returns the version of the weights that the server holds."""
        answer = await self.client.request("GET", "/weight_info")
        with reading("/weight_info without a version"):
            return str(answer["weight_version"])

    async def _check_version(self) -> None:
        """Raises Transient if the server was restarted, once it has the weights again."""
        version = await self.current_version()
        if version == self.version:
            return
        if version != FIRST_VERSION:
            found = self.client.in_a_line(version)
            raise RunError(
                f"{self.client.name}: another run has given this server its weights (version "
                f"{found}): a rollout server serves one run; start another one"
            )
        await asyncio.shield(self.load("abort"))  # half of it would leave the server paused
        raise Transient("it was restarted; it has been given the weights again")

    async def sample(self, request: Request, sampling: Sampling) -> Rollout:
        """Samples one completion, through restarts of the server and bad answers."""
        async with self._places:
            complete = partial(self._complete, request, sampling)
            ids, log_probs = await self.client.patiently(complete)
        return request.rollout(ids, log_probs, ids[-1] in sampling.stop_ids)

    async def _complete(self, request: Request, sampling: Sampling) -> Completion:
        """Returns ids and log-probs of a whole completion by the weights of the last sync."""
        # Before and after: the server may be restarted at any moment.
        await self._check_version()
        body = {"model": self.model, "prompt": request.prompt_ids, "return_token_ids": True}
        body |= vllm_parameters(sampling.of(request), request.seed)
        answer = await self.client.request("POST", "/v1/completions", body)
        await self._check_version()
        with reading("an answer that is no completion"):
            return read_completion(answer, sampling.of(request))


class VllmServerEngine:
    """Samples from the vLLM server that `client` reaches.

    `weights()` yields the student's weights as `VllmEngine` takes them, for `vocab_size` ids. The
    main process writes them to a folder of the run's own in `folder`, which is deleted with the
    engine, and tells the server. `barrier()` waits for all processes, each of which samples its own
    requests, `concurrency` at once. A server that was restarted is given the weights again. Raises
    UsageError if there is no vLLM server; RunError if it stays away, holds another run's weights,
    or refuses something.
    """

    concurrent = True

    def __init__(
        self,
        client: JsonClient,
        weights: Weights,
        folder: Path,
        concurrency: int,
        vocab_size: int,
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        self.weights, self.is_main, self.barrier = weights, is_main, barrier
        self.run, self.syncs = uuid.uuid4().hex, 0
        try:
            model, *_ = wait(client.models())
        except Transient as error:
            raise UsageError(
                f"{client.key}: no vLLM server answers at {client.url} ({error}); start one: "
                "VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT"
            ) from None
        self.server = StudentServer(client, model, folder.absolute(), concurrency, vocab_size)
        if is_main:
            own = self.server.folder / self.run
            weakref.finalize(self, shutil.rmtree, own, ignore_errors=True)

    @classmethod
    def build(
        cls, student: Student, config: Config, accelerator: Accelerator, longest: int | None
    ) -> "VllmServerEngine":
        """Returns the engine of a run; the server knows the `longest` sequence that it takes."""
        section = config.rollout.server
        client = JsonClient(
            "rollout.server.url",
            section.url,
            timeout=section.timeout,
            patience=section.patience,
            api_key_env=section.api_key_env,
            not_found="start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, on an address "
            "that only you can reach",
        )
        return cls(
            client,
            partial(shared_weights, student),
            Path(section.weights_dir or f"{config.run.dir}/weights"),
            section.concurrency,
            len(student.kept_ids()),
            accelerator.is_main_process,
            accelerator.wait_for_everyone,
        )

    def sync(self) -> None:
        """Gives the server the student's weights as they are now; all processes call it."""
        self.syncs += 1
        server = self.server
        # Gathering is collective: every process goes through the weights, one keeps them.
        found = ((name, tensor.detach()) for name, tensor in self.weights())
        if self.is_main:
            server.version = f"{self.run}/sync-{self.syncs}"
            self._write({name: tensor.to("cpu", copy=True) for name, tensor in found})
            wait(server.client.patiently(partial(server.load, "wait")))
            for old in server.target.parent.glob("sync-*"):
                if old != server.target:
                    shutil.rmtree(old)
        else:
            for _ in found:
                pass
        self.barrier()
        if not self.is_main:
            server.version = wait(server.client.patiently(server.current_version))
        self.barrier()

    def _write(self, weights: dict[str, Tensor]) -> None:
        """Writes weights where the server will read them, whole or not at all."""
        target = self.server.target
        temporary = target.with_name(f".tmp-{target.name}")
        temporary.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary / "model.safetensors")
        temporary.rename(target)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        """Yields rollouts as they end; requests under way are given up if the caller stops."""
        futures = [start(self.server.sample(request, sampling)) for request in requests]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def read_completion(answer: Json, sampling: Sampling) -> Completion:
    """Returns ids and log-probs of an answer; raises Transient if the completion is not whole."""
    (choice,) = answer["choices"]
    ids, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    complete = (
        0 < len(ids) <= sampling.max_new_tokens and ids[-1] in sampling.stop_ids
        if choice["finish_reason"] == "stop"
        else len(ids) == sampling.max_new_tokens
    )
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"expected token ids, got {shown(ids)}")
    if not complete or len(log_probs) != len(ids) or None in log_probs:
        raise Transient(
            f"a completion of {len(ids)} tokens and {len(log_probs)} log-probs ended early "
            f"({choice['finish_reason']})"
        )
    return ids, [read_log_prob(value) for value in log_probs]
