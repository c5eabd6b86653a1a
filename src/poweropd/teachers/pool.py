"""Log-probabilities of token sequences from vLLM servers, through restarts and bad answers.

An answer is used only if it is whole: one log-prob for each id that was sent, and of that id.
Whatever else happens, the sequence is sent again. A server that failed is set aside until it
scores a known sequence as it did at the start; if it does not within a set time, the run ends.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from poweropd.config.teachers import TeacherConfig
from poweropd.errors import RunError, UsageError
from poweropd.net import Json, JsonClient, Patience, Refused, Transient, read_log_prob, reading

logger = logging.getLogger("poweropd")

LARGEST_ID = 2**31
MOST_OTHERS = 20  # ids of a context that vLLM tells of unless it is started with more
TOLERANCE = 0.05  # mean |difference| of log-probs, nats: rounding in bfloat16, not another model


class Scores(NamedTuple):
    """The scores of a sequence's ids but the first."""

    log_probs: list[float]  # of the ids
    greedy: list[int]  # the most probable ids of the contexts; the ids if they were not asked for


class PooledServer:
    """One of the servers: its client, its requests under way and its failures."""

    def __init__(self, client: JsonClient, model: str) -> None:
        self.client, self.model, self.busy = client, model, 0
        self.is_down = False
        self.recognized = 0  # connections that the client had made when it was last recognized
        self.recognizing = asyncio.Lock()
        self.patience = Patience(client.patience)  # failures since it was last up

    async def log_probs(self, ids: list[int], what: str) -> list[float]:
        """Returns the log-probs of ids[1:]; `what` names the ids in errors."""
        return (await self.scores(ids, what)).log_probs

    async def scores(
        self, ids: list[int], what: str, merged_ids: frozenset[int] | None = None
    ) -> "Scores":
        """Returns the scores of ids[1:], with the most probable ids if `merged_ids` are given."""
        others = 0 if merged_ids is None else min(1 + len(merged_ids), MOST_OTHERS)
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,  # vLLM refuses 0
            "temperature": 0,
            "prompt_logprobs": others,  # beside the prompt's own tokens
            "return_token_ids": True,
        }
        answer = await self.client.request("POST", "/v1/completions", body, what)
        with reading(f"an answer without one log-prob for each of {len(ids)} tokens"):
            (choice,) = answer["choices"]
            first, *entries = choice["prompt_logprobs"]
            found = [
                entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries, strict=True)
            ]
            if first is not None or choice["prompt_token_ids"] != ids:
                raise ValueError
        with reading("an answer with something that is not a log-prob"):
            if merged_ids is None:
                return Scores([read_log_prob(value) for value in found], ids[1:])
            pairs = [_told(*one, merged_ids) for one in zip(ids[1:], entries, strict=True)]
            return Scores(*map(list, zip(*pairs, strict=True)))

    async def at_start(self, ids: list[int], what: str) -> list[float]:
        """Returns the same when a run starts."""
        return await self.client.patiently(partial(self.log_probs, ids, what), at_start=True)

    async def context(self) -> int:
        """Returns the length in tokens of the longest sequence that the server takes."""
        found = await self.client.patiently(self.client.models, at_start=True)
        if self.model not in found:
            served = self.client.in_a_line(", ".join(found))
            raise UsageError(f"teacher.model: {self.client.url} serves {served}, not {self.model}")
        context = found[self.model]
        if context is None:
            raise UsageError(
                f"{self.client.key}: {self.client.url} does not tell its max_model_len; "
                "expected vLLM"
            )
        return context


class Pool:
    """Scores on the least loaded of several servers of one model. All of it runs in one loop."""

    def __init__(self, section: TeacherConfig) -> None:
        self.concurrency, self.patience = section.concurrency, section.patience
        self.servers = [
            PooledServer(
                JsonClient(
                    "teacher.servers",
                    url,
                    timeout=section.timeout,
                    patience=section.patience,
                    api_key_env=section.api_key_env,
                    not_found="check teacher.model and teacher.servers",
                ),
                section.model,
            )
            for url in section.servers
        ]
        self._changed = asyncio.Condition()  # a place is free, or a server is up, or all is lost
        self._failure: RunError | None = None
        self._known: tuple[list[int], list[float]] | None = None  # ids and their log-probs
        self._revivals: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends what still waits for a server."""
        for revival in self._revivals:
            revival.cancel()
        self._failure = RunError("the teacher's servers are no longer needed")
        async with self._changed:
            self._changed.notify_all()

    # Scoring.

    async def score(
        self, ids: list[int], what: str, merged_ids: frozenset[int] | None = None
    ) -> Scores:
        """Returns the scores of ids[1:], each given all ids before it.

        With `merged_ids`, which count as one id, the smallest of them, the server tells its most
        probable ids beside. `what` names the ids in errors. Raises RunError if a server refuses
        them, or if none has answered within the teacher's patience.
        """
        patience = Patience(self.patience)
        while True:
            server = await self._take()
            try:
                scores = await server.scores(ids, what, merged_ids)
                await self._recognize_connections(server)
                server.patience.failures = 0
                return scores
            except Transient as failure:
                patience.after(failure)
                if patience.is_out:
                    raise server.client.gave_up(failure) from None
                self._set_aside(server, failure)
            finally:
                server.busy -= 1
                async with self._changed:
                    self._changed.notify()

    async def _take(self) -> PooledServer:
        """Returns the server with the fewest requests, once one has a free place."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or self._ready())
            if self._failure is not None:
                raise self._failure
            server = min(self._ready(), key=lambda s: s.busy)
            server.busy += 1
            return server

    def _ready(self) -> list[PooledServer]:
        """Returns the servers that can take one more request."""
        up = (server for server in self.servers if not server.is_down)
        return [server for server in up if server.busy < self.concurrency]

    # Failures.

    def _set_aside(self, server: PooledServer, failure: Transient) -> None:
        """Keeps requests from the server until it is itself again."""
        if not server.is_down:
            server.is_down = True
            reason = server.client.in_a_line(str(failure))
            logger.warning("%s: %s; trying again", server.client.name, reason)
            revival = asyncio.create_task(self._revive(server, failure))
            self._revivals.add(revival)
            revival.add_done_callback(self._revivals.discard)

    async def _revive(self, server: PooledServer, failure: Transient) -> None:
        """Waits until the server is itself again, or all servers have been away for too long."""
        while self._failure is None:
            await asyncio.sleep(server.patience.after(failure))
            try:
                await self._recognize(server)
                server.is_down, server.patience.since = False, None
                break
            except Transient as again:
                failure = again
            except RunError as error:
                self._failure = error
            # While another server is up, this one may stay away.
            lost = all(other.is_down and other.patience.is_out for other in self.servers)
            if lost and self._failure is None:
                self._failure = server.client.gave_up(failure)
        async with self._changed:
            self._changed.notify_all()

    async def _recognize_connections(self, server: PooledServer) -> None:
        """Raises RunError if what is behind a new connection is not the server of the start."""
        async with server.recognizing:
            while server.recognized != server.client.connections:
                before = server.client.connections
                await self._recognize(server)
                server.recognized = before

    async def recognize_all(self) -> None:
        """Raises RunError if a server that is up is not what it was when the run started."""
        for server in self.servers:
            if not server.is_down:
                try:
                    await self._recognize(server)
                except Transient as failure:  # it is recognized when it is up again
                    self._set_aside(server, failure)

    async def _recognize(self, server: PooledServer) -> None:
        """Raises RunError if the server is not what it was: another model may have been started."""
        if self._known is None:  # the servers are still being checked
            return
        ids, expected = self._known
        difference = mean_difference(await server.log_probs(ids, "a test sequence"), expected)
        if difference > TOLERANCE:
            raise RunError(
                f"{server.client.name} gives other log-probs than when the run started "
                f"(mean difference {difference:.3g}): start it with the model it had, then run "
                "the same command to go on"
            )

    # At the start of a run.

    async def takes(self, token: int) -> bool:
        """Returns whether the id is in the vocabulary of every server."""
        try:
            for server in self.servers:
                await server.at_start([token, token], f"id {token}")
        except Refused:
            return False
        return True

    async def check(self, sequences: Sequence[list[int]]) -> float:
        """Scores sequences twice on every server, and keeps the first of them as known.

        Returns the largest mean |difference| of a sequence's log-probs, in nats.
        """
        found = [
            [await server.at_start(ids, "a prompt") for ids in sequences]
            for server in [*self.servers, *self.servers]
        ]
        first, *others = found
        self._known = (sequences[0], first[0])
        for server in self.servers:
            server.recognized = server.client.connections
        return max(
            mean_difference(a, b) for other in others for a, b in zip(other, first, strict=True)
        )


def _told(token: int, entry: Json, merged_ids: frozenset[int]) -> tuple[float, int]:
    """Returns the log-prob of an id and the most probable id, by what an answer tells of a context.

    The merged ids that it tells of are one id with their summed probability.
    """
    found = {int(i): read_log_prob(told["logprob"]) for i, told in entry.items()}
    if not all(0 <= i < LARGEST_ID for i in found):
        raise ValueError
    merged = [found.pop(i) for i in merged_ids if i in found]
    if merged:
        probability = sum(math.exp(log_prob) for log_prob in merged)
        found[min(merged_ids)] = math.log(probability) if probability else -math.inf
    own = min(merged_ids) if token in merged_ids else token
    return found[own], max(found, key=found.__getitem__)


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns the mean |difference|; 0 for no numbers."""
    pairs = zip(one, other, strict=True)
    return sum(0.0 if a == b else abs(a - b) for a, b in pairs) / max(1, len(one))
