"""Log-probabilities of token sequences from vLLM servers, through restarts and bad answers.

An answer is used only if it is whole: one log-prob for each id that was sent, and of that id.
Whatever else happens, the sequence is sent again. A server that failed is set aside until it
scores a known sequence as it did at the start; if it does not within a set time, the run ends.
"""

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import httpx2

from poweropd.errors import RunError, UsageError

logger = logging.getLogger("poweropd")

START_SECONDS = 30.0  # how long a server may take to answer when a run starts
CONNECT_SECONDS = 10.0
FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0  # seconds before a server that failed is tried again
KEEP_ALIVE_SECONDS = 4.0  # below uvicorn's 5: a connection must not be reused as it is closed
TOLERANCE = 0.05  # mean |difference| of log-probs, nats: rounding in bfloat16, not another model
RETRIED = {408, 429, *range(500, 600)}  # statuses of a server that may answer later
ADVICE = {
    401: "check the key in the variable that teacher.api_key_env names",
    403: "check the key in the variable that teacher.api_key_env names",
    404: "check teacher.model and teacher.servers",
}


class Fault(Exception):
    """What may go well another time. `wait`: the seconds that the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Refusal(RunError):
    """A server understood, and will not do it."""


@dataclass(frozen=True)
class PoolSettings:
    """As in a recipe's `teacher` section; times in seconds."""

    model: str
    timeout: float
    concurrency: int  # requests at once, of each server
    give_up_after: float
    api_key: str | None = field(default=None, repr=False)


@dataclass
class TeacherServer:
    """One base URL."""

    url: str
    busy: int = 0  # requests under way
    failures: int = 0  # since its last good answer
    down_since: float | None = None  # the event loop's time


class Pool:
    """Scores on the least loaded of several servers of one model. All of it runs in one loop."""

    def __init__(self, urls: Sequence[str], settings: PoolSettings) -> None:
        self.servers = [TeacherServer(url) for url in urls]
        self.settings = settings
        self._changed = asyncio.Condition()  # a place is free, or a server is up, or all is lost
        self._failure: RunError | None = None
        self._known: tuple[list[int], list[float]] | None = None  # ids and their log-probs
        self._revivals: set[asyncio.Task[None]] = set()
        key = settings.api_key
        self._client = httpx2.AsyncClient(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(
                settings.timeout, connect=min(CONNECT_SECONDS, settings.timeout), pool=None
            ),
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS),
        )

    async def close(self) -> None:
        await self._client.aclose()

    # Scoring.

    async def score(self, ids: list[int], what: str) -> list[float]:
        """Log-probs of ids[1:], each given all ids before it; `what` names the ids in errors.

        Raises RunError where a server refuses them, or none has answered for `give_up_after`.
        """
        failing_since = None
        while True:
            server = await self._take()
            try:
                log_probs = await self._ask(server, ids, what)
                server.failures = 0
                return log_probs
            except Fault as fault:
                now = asyncio.get_running_loop().time()
                failing_since = now if failing_since is None else failing_since
                if now - failing_since >= self.settings.give_up_after:
                    raise self._gave_up(server, fault) from None
                self._set_aside(server, fault)
            finally:
                server.busy -= 1
                async with self._changed:
                    self._changed.notify()

    async def _take(self) -> TeacherServer:
        """A place at the server with the fewest requests, once there is one."""
        async with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                ready = [
                    server
                    for server in self.servers
                    if server.down_since is None and server.busy < self.settings.concurrency
                ]
                if ready:
                    server = min(ready, key=lambda s: s.busy)
                    server.busy += 1
                    return server
                await self._changed.wait()

    async def _ask(self, server: TeacherServer, ids: list[int], what: str) -> list[float]:
        body = {
            "model": self.settings.model,
            "prompt": ids,
            "max_tokens": 1,  # vLLM refuses 0
            "temperature": 0,
            "prompt_logprobs": 0,  # of the prompt's own tokens, no others
            "return_token_ids": True,
        }
        response = await self._request(server, "POST", "/v1/completions", what, body)
        return read_log_probs(response, ids)

    async def _request(
        self, server: TeacherServer, method: str, path: str, what: str, body: Any = None
    ) -> httpx2.Response:
        seconds = self.settings.timeout
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.request(method, f"{server.url}{path}", json=body)
        except (TimeoutError, httpx2.ReadTimeout):
            raise Fault(f"no answer within teacher.timeout={seconds:g} seconds") from None
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise Fault(self._without_key(f"{type(error).__name__} {error}").strip()) from None
        if response.status_code in RETRIED:
            reason = f"HTTP {response.status_code}: {self._detail(response)}"
            raise Fault(reason, wait=_retry_after(response))
        if response.status_code != 200:
            advice = ADVICE.get(response.status_code, "see docs/teachers.md")
            raise Refusal(
                f"teacher server {server.url} refuses {what} with HTTP {response.status_code}: "
                f"{self._detail(response)}; {advice}"
            )
        return response

    def _detail(self, response: httpx2.Response) -> str:
        """What the server says, in one line."""
        text = " ".join(self._without_key(response.text).split())
        return text[:300] or response.reason_phrase

    def _without_key(self, text: str) -> str:
        """Some servers and libraries repeat the key in what they complain about."""
        key = self.settings.api_key
        return text if key is None else text.replace(key, "[key]")

    # Faults.

    def _set_aside(self, server: TeacherServer, fault: Fault) -> None:
        """Sends the server nothing until it is itself again."""
        if server.down_since is None:
            server.down_since = asyncio.get_running_loop().time()
            logger.warning("teacher server %s: %s; trying again", server.url, fault)
            revival = asyncio.create_task(self._revive(server, fault))
            self._revivals.add(revival)
            revival.add_done_callback(self._revivals.discard)

    async def _revive(self, server: TeacherServer, fault: Fault) -> None:
        loop, patience = asyncio.get_running_loop(), self.settings.give_up_after
        while self._failure is None:
            delay = max(min(fault.wait, patience), backoff(server.failures))
            server.failures += 1
            await asyncio.sleep(delay)
            try:
                await self._recognize(server)
                server.down_since = None
                break
            except Fault as again:
                fault = again
            except RunError as error:
                self._failure = error
            # While another server is up, this one may stay away.
            down = [s.down_since for s in self.servers if s.down_since is not None]
            if len(down) == len(self.servers) and loop.time() - max(down) >= patience:
                self._failure = self._gave_up(server, fault)
        async with self._changed:
            self._changed.notify_all()

    async def _recognize(self, server: TeacherServer) -> None:
        """Whether the server still is what it was: another model may have been started there."""
        assert self._known is not None, "the servers have not been checked"
        ids, expected = self._known
        difference = mean_difference(await self._ask(server, ids, "a test sequence"), expected)
        if difference > TOLERANCE:
            raise RunError(
                f"teacher server {server.url} gives other log-probs than when the run started "
                f"(mean difference {difference:.3g}): start it with the model it had, then run "
                "the same command to go on"
            )

    def _gave_up(self, server: TeacherServer, fault: Fault) -> RunError:
        return RunError(
            f"teacher server {server.url}: {fault}, for {self.settings.give_up_after:g} seconds "
            "(teacher.give_up_after): look at its log, start it again, then run the same command "
            "to go on"
        )

    # At the start of a run.

    async def contexts(self) -> list[int]:
        """The longest sequence that each server takes, in tokens."""
        return [await _patiently(server, partial(self._context, server)) for server in self.servers]

    async def _context(self, server: TeacherServer) -> int:
        try:
            response = await self._request(server, "GET", "/v1/models", "to list its models")
            found = {model["id"]: model.get("max_model_len") for model in response.json()["data"]}
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"teacher.servers: {server.url} is not an OpenAI-compatible server"
            ) from None
        if self.settings.model not in found:
            raise UsageError(
                f"teacher.model: {server.url} serves {', '.join(found)}, not {self.settings.model}"
            )
        if not isinstance(found[self.settings.model], int):
            raise UsageError(
                f"teacher.servers: {server.url} does not tell its max_model_len; expected vLLM"
            )
        return found[self.settings.model]

    async def takes(self, token: int) -> bool:
        """Whether the id is in the vocabulary of every server."""
        try:
            for server in self.servers:
                await _patiently(server, partial(self._ask, server, [token, token], f"id {token}"))
        except Refusal:
            return False
        return True

    async def check(self, sequences: Sequence[list[int]]) -> float:
        """Scores sequences twice on every server, and keeps the first of them as known.

        Returns the largest mean |difference| of a sequence's log-probs, in nats.
        """
        found = []
        for server in [*self.servers, *self.servers]:
            questions = [partial(self._ask, server, ids, "a prompt") for ids in sequences]
            found.append([await _patiently(server, question) for question in questions])
        first, *others = found
        self._known = (sequences[0], first[0])
        return max(
            mean_difference(a, b) for other in others for a, b in zip(other, first, strict=True)
        )


async def _patiently(server: TeacherServer, ask: Callable[[], Awaitable[Any]]) -> Any:
    """Asks until there is an answer, or no more patience."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_SECONDS
    failures = 0
    while True:
        try:
            return await ask()
        except Fault as fault:
            delay = max(fault.wait, backoff(failures))
            failures += 1
            if loop.time() + delay > deadline:
                raise RunError(
                    f"teacher server {server.url} does not answer as it should ({fault}): start "
                    "it as docs/teachers.md shows, or correct teacher.servers"
                ) from None
            await asyncio.sleep(delay)


def backoff(failures: int) -> float:
    """Seconds: doubling from FIRST_DELAY to LONGEST_DELAY, less up to half at random, so that
    the requests of several runs do not come back together."""
    longest = min(FIRST_DELAY * 2.0 ** min(failures, 16), LONGEST_DELAY)
    return random.uniform(longest / 2, longest)


def _retry_after(response: httpx2.Response) -> float:
    """Seconds; the header holds them or a date."""
    value = response.headers.get("Retry-After", "0")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def read_log_probs(response: httpx2.Response, ids: Sequence[int]) -> list[float]:
    """Log-probs of ids[1:]; a Fault unless there is exactly one of each id that was sent."""
    try:
        (choice,) = response.json()["choices"]
        first, *entries = choice["prompt_logprobs"]
        log_probs = [
            float(entry[str(token)]["logprob"])
            for token, entry in zip(ids[1:], entries, strict=True)
        ]
        if first is not None or choice["prompt_token_ids"] != list(ids):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise Fault(f"an answer without one log-prob for each of {len(ids)} tokens") from None
    if not all(map(math.isfinite, log_probs)):
        raise Fault("an answer with a log-prob that is not finite")
    return log_probs


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean |difference|; 0 of nothing."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / max(1, len(one))
