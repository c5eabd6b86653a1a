"""Sampling from servers whose model stays as it is: a served teacher that is evaluated itself."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from functools import partial
from itertools import cycle

from poweropd.config.teachers import TeacherConfig
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import RunError
from poweropd.net import JsonClient, reading, start
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.vllm import vllm_parameters
from poweropd.rollouts.vllm_server import Completion, read_completion


class ServedModel:
    """Samples from the vLLM servers of a `teacher` section, in turns.

    Raises RunError if a server refuses, stays away, or has no completions API that tells token ids.
    """

    concurrent = True

    def __init__(self, section: TeacherConfig) -> None:
        self.model = section.model
        self.clients = [
            JsonClient(
                "teacher.servers",
                url,
                timeout=section.timeout,
                patience=section.patience,
                api_key_env=section.api_key_env,
                not_found="evaluate.teacher samples from /v1/completions of the teacher's servers; "
                "check teacher.model, or set evaluate.teacher=false",
            )
            for url in section.servers
        ]
        self._places = asyncio.Semaphore(section.concurrency * len(self.clients))

    def sync(self) -> None:
        """Does nothing, for the weights stay as they are."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        """Yields rollouts as they end; requests under way are given up if the caller stops."""
        pairs = zip(requests, cycle(self.clients), strict=False)
        futures = [start(self._sample(request, client, sampling)) for request, client in pairs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    async def _sample(self, request: Request, client: JsonClient, sampling: Sampling) -> Rollout:
        async with self._places:
            complete = partial(self._complete, request, client, sampling)
            ids, log_probs = await client.patiently(complete)
        return request.rollout(ids, log_probs, ids[-1] in sampling.stop_ids)

    async def _complete(
        self, request: Request, client: JsonClient, sampling: Sampling
    ) -> Completion:
        """Returns ids and log-probs of a whole completion."""
        body = {"model": self.model, "prompt": request.prompt_ids, "return_token_ids": True}
        body |= vllm_parameters(sampling.of(request), request.seed)
        answer = await client.request("POST", "/v1/completions", body)
        with reading("an answer that is no completion"):
            if "token_ids" not in answer["choices"][0]:
                raise RunError(
                    f"{client.name}: its completions have no token ids (return_token_ids of "
                    "vLLM), which evaluate.teacher needs: set it to false"
                )
            return read_completion(answer, sampling.of(request))
