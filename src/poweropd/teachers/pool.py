"""Log-probabilities of token sequences from servers, through restarts and bad answers.

An answer is used only if it is whole (see `protocols`). Whatever else happens, the sequence is sent
again. A server that failed is set aside until it
scores a known sequence as it did at the start; if it does not within a set time, the run ends.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from poweropd.config.teachers import TeacherConfig
from poweropd.errors import RunError, UsageError, import_object
from poweropd.net import JsonClient, Patience, Refused, Transient
from poweropd.teachers import SERVER_TYPES
from poweropd.teachers.protocols import Protocol, Query, Told

logger = logging.getLogger("poweropd")

TOLERANCE = 0.05  # mean |difference| of log-probs, nats: rounding in bfloat16, not another model
NUM_PROBED = 16  # last tokens of a prompt that are scored with and without the prefix cache


class Checked(NamedTuple):
    """What servers differ by at the start of a run: means of |differences| of log-probs, nats."""

    repeated: float  # the same prompts, scored twice, on any server
    cached: float  # from a prefix cache and without it, on the same server


class PooledServer:
    """One of the servers: its client, its requests under way and its failures."""

    def __init__(self, client: JsonClient, model: str, protocol: Protocol) -> None:
        self.client, self.model, self.protocol, self.busy = client, model, protocol, 0
        self.is_down = False
        self.recognized = 0  # connections that the client had made when it was last recognized
        self.recognizing = asyncio.Lock()
        self.patience = Patience(client.patience)  # failures since it was last up

    async def told(self, query: Query, what: str) -> list[Told]:
        """Returns what the server tells of a query's targets; `what` names it in errors."""
        return await self.protocol.told(self.client, self.model, query, what)

    async def log_probs(self, query: Query, what: str) -> list[float]:
        """Returns the log-probs of a query's targets."""
        told = await self.told(query, what)
        return [each[token] for token, each in zip(query.targets, told, strict=True)]

    def look(self, ids: list[int]) -> Query:
        """Returns a query for as many of the ids as a look at the server takes."""
        return Query(ids).last(self.protocol.most_checked)

    async def at_start(self, query: Query, what: str) -> list[float]:
        """Returns the log-probs of a query's targets when a run starts."""
        return await self.client.patiently(partial(self.log_probs, query, what), at_start=True)

    async def context(self) -> int:
        """Returns the length in tokens of the longest sequence that the server takes."""
        ask = partial(self.protocol.contexts, self.client)
        found = await self.client.patiently(ask, at_start=True)
        if self.model not in found:
            served = self.client.in_a_line(", ".join(found))
            raise UsageError(f"teacher.model: {self.client.url} serves {served}, not {self.model}")
        context = found[self.model]
        if context is None:
            raise UsageError(
                f"{self.client.key}: {self.client.url} does not tell its max_model_len; is it a "
                f"server of teacher.server_type={self.protocol.name}?"
            )
        return context

    async def check_top(self, ids: list[int], top: int) -> None:
        """Raises UsageError unless it tells of so many of the most probable ids of a context."""
        query = replace(self.look([*ids, ids[-1]]), top=top)
        try:
            told = await self.client.patiently(partial(self.told, query, "a prompt"), at_start=True)
            fits, short = all_told(told, top), f"it told of {min(map(len, told))}"
        except Refused as refusal:
            fits, short = False, str(refusal)
        if not fits:
            raise UsageError(
                f"objective.teacher_top_k: {self.client.url} does not give {top} log-probs of a "
                f"context: {self.protocol.remedy.format(k=top)} ({short})"
            )


class Pool:
    """Scores on the least loaded of several servers of one model. All of it runs in one loop."""

    def __init__(self, section: TeacherConfig) -> None:
        self.concurrency, self.patience = section.concurrency, section.patience
        protocol = import_object("teacher.server_type", SERVER_TYPES[section.server_type])()
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
                protocol,
            )
            for url in section.servers
        ]
        self._changed = asyncio.Condition()  # a place is free, or a server is up, or all is lost
        self._failure: RunError | None = None
        self._known: tuple[list[int], list[float]] | None = None  # ids, and log-probs of a look
        self._revivals: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends what still waits for a server."""
        for revival in self._revivals:
            revival.cancel()
        self._failure = RunError("the teacher's servers are no longer needed")
        async with self._changed:
            self._changed.notify_all()

    # Scoring.

    async def score(self, query: Query, what: str) -> list[Told]:
        """Returns what a server tells of a query's targets; `what` names the query in errors.

        Raises RunError if a server refuses it, or if none has answered within the teacher's
        patience.
        """
        patience = Patience(self.patience)
        while True:
            server = await self._take()
            try:
                told = await server.told(query, what)
                if not all_told(told, query.top):
                    raise Transient(f"an answer with fewer than {query.top} ids of a context")
                await self._recognize_connections(server)
                server.patience.failures = 0
                return told
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
        found = await server.log_probs(server.look(ids), "a test sequence")
        difference = mean_difference(found, expected)
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
                await server.at_start(Query([token, token]), f"id {token}")
        except Refused:
            return False
        return True

    async def check(self, sequences: Sequence[list[int]]) -> Checked:
        """Scores sequences twice on every server, and keeps the first of them as known.

        The end of the longest one is scored twice more on each of them, with a prefix cache, which
        by then has all of it, and without one.
        """
        found = [
            [await server.at_start(server.look(ids), "a prompt") for ids in sequences]
            for server in [*self.servers, *self.servers]
        ]
        first, *others = found
        self._known = (sequences[0], first[0])
        end = Query(max(sequences, key=len)).last(NUM_PROBED)
        cached = [
            [await server.at_start(query, "a prompt") for query in (end, replace(end, fresh=True))]
            for server in self.servers
        ]
        for server in self.servers:
            server.recognized = server.client.connections
        return Checked(
            max(
                mean_difference(a, b) for other in others for a, b in zip(other, first, strict=True)
            ),
            max(mean_difference(*pair) for pair in cached),
        )

    async def check_top(self, ids: list[int], top: int) -> None:
        """Raises UsageError unless all servers tell of so many of a context's most probable ids."""
        for server in self.servers:
            await server.check_top(ids, top)


def all_told(told: Sequence[Told], top: int) -> bool:
    """Returns whether each context has as many ids as were asked for."""
    return all(len(each) >= top for each in told)


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns the mean |difference|; 0 for no numbers."""
    pairs = zip(one, other, strict=True)
    return sum(0.0 if a == b else abs(a - b) for a, b in pairs) / max(1, len(one))
