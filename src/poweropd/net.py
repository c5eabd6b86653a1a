"""The JSON client for teacher and rollout servers, and the checks of their addresses and keys.

A request ends in one of three ways: with JSON, as a `Transient` failure, after which it may be
repeated, or as `Refused`. All requests run in one event loop in a thread of its own, so that
synchronous code can have many under way and can cancel them.
"""

import asyncio
import json
import logging
import math
import os
import random
import ssl
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from poweropd.errors import UNREADABLE, RunError, UsageError, one_line, shown

logger = logging.getLogger("poweropd")
Json = Any  # a value as `json.loads` returns it
Answer = TypeVar("Answer")

CONNECT_SECONDS = 10.0
START_SECONDS = 30.0  # how long a server may take to answer when a run starts
FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0  # seconds before a server that failed is tried again
KEEP_ALIVE_SECONDS = 4.0  # below uvicorn's 5, or the server may close what is just being reused
RETRIED = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, *range(500, 600)}
MALFORMED = (KeyError, IndexError, TypeError, ValueError)  # what reading a wrong answer raises
MAX_ANSWER_BYTES = 2**26  # of one answer; no protocol here comes near
SHOWN_OF_KEY = 5  # characters of a key that a message may hold in a row
NO_LOG_PROB = -9999.0  # what vLLM writes for minus infinity
_jitter = random.Random()  # of its own: a pause must not change what a user seeded
ROUNDING = 1e-3  # nats by which a log-prob may be above 0


def check_url(key: str, url: str) -> None:
    """Raises ValueError, without repeating a password, if `url` is not a base URL."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        plain = parts.username is None and parts.password is None and not parts.query
    except ValueError:  # brackets that do not match, or a port that is not a number
        known = plain = False
    if not known or not plain:
        raise ValueError(
            f"{key}: expected a base URL such as http://127.0.0.1:8000, without a key or "
            f"password (see api_key_env), got ...{url.rpartition('@')[2].partition('?')[0]}"
        )


def read_api_key(key: str, variable: str | None) -> str | None:
    """Returns the value of an environment variable; raises UsageError if it cannot be a key."""
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value or not value.isascii():
        raise UsageError(
            f"{key}: expected a key of ASCII characters in the variable {variable}, which is "
            f"{'not plain text' if value else 'not set'}"
        )
    return value


@dataclass(frozen=True)
class Response:
    """What is used of an answer: never its charset nor its other headers, which may be anything.

    `wait` is the seconds of its Retry-After, 0 without one.
    """

    status: int
    content: bytes
    wait: float


class Transient(Exception):
    """A transient failure; the request may be repeated, after `wait` seconds if the server said so.

    `wait` is 0 if it did not.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Refused(RunError):
    """A request that the server understood and would refuse again."""


class Patience:
    """Counts failures in a row, which may go on for `seconds` after the first of them."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.failures = seconds, 0
        self.since: float | None = None  # of the monotonic clock; None before the first failure

    def after(self, failure: Transient) -> float:
        """Counts a failure; returns the seconds to wait before the next attempt."""
        if self.since is None:
            self.since = time.monotonic()
        self.failures += 1
        return max(min(failure.wait, self.seconds), backoff(self.failures - 1))

    @property
    def is_out(self) -> bool:
        """Says whether failures have gone on for too long."""
        return self.since is not None and time.monotonic() - self.since >= self.seconds


class JsonClient:
    """Sends JSON to one server.

    `key` is the key of the recipe that holds the URL, such as "teacher.servers". `timeout` bounds
    one request and `patience` the time for which the server may be away, both in seconds. The API
    key is the value of the environment variable `api_key_env`; no message repeats it. `not_found`
    says what to check after HTTP 404. Raises UsageError if that variable holds no key.
    """

    def __init__(
        self,
        key: str,
        url: str,
        *,
        timeout: float,
        patience: float,
        api_key_env: str | None = None,
        not_found: str = "check the URL",
    ) -> None:
        self.key, self.url = key, url.rstrip("/").removesuffix("/v1")
        self.timeout, self.patience = timeout, patience
        self.section, kind = key.rpartition(".")[0], key.partition(".")[0]
        self.name, self.docs = f"{kind} server {self.url}", f"docs/{kind}s.md"
        self._key = read_api_key(f"{self.section}.api_key_env", api_key_env)
        check_key = f"check the key in the variable that {self.section}.api_key_env names"
        self.connections = 0
        self._advice = {401: check_key, 403: check_key, 404: not_found}
        self._http = http = httpx2.AsyncClient(
            headers={} if self._key is None else {"Authorization": f"Bearer {self._key}"},
            timeout=httpx2.Timeout(None, connect=min(CONNECT_SECONDS, timeout)),
            verify=_trusted(),
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS),
        )
        weakref.finalize(self, lambda: start(http.aclose())).atexit = False

    async def request(self, method: str, path: str, body: Json = None, what: str = "") -> Json:
        """Returns the JSON of the answer, None if it is empty; raises Transient or Refused.

        `what` names the request in errors; by default its path does.
        """
        try:
            async with asyncio.timeout(self.timeout):
                response = await self._bounded(method, path, body)
        except TimeoutError:
            limit = f"{self.section}.timeout={self.timeout:g}"
            raise Transient(f"no answer within {limit} seconds") from None
        except (httpx2.RequestError, httpx2.InvalidURL, *MALFORMED) as error:
            raise Transient(self.in_a_line(f"{type(error).__name__} {error}")) from None
        status = response.status
        if status in RETRIED:
            raise Transient(f"HTTP {status}: {self._detail(response)}", response.wait)
        if not 200 <= status < 300:
            raise Refused(
                f"{self.name} refuses {what or path} with HTTP {status}: "
                f"{self._detail(response)}; {self._advice.get(status, f'see {self.docs}')}"
            )
        try:
            return json.loads(response.content) if response.content else None
        except UNREADABLE:
            raise Transient(f"no JSON from {path}: {self._detail(response)}") from None

    async def _bounded(self, method: str, path: str, body: Json) -> "Response":
        """Returns the whole response; raises Transient if it is longer than any answer can be."""
        request = self._http.build_request(method, f"{self.url}{path}", json=body)
        request.extensions["trace"] = self._trace
        response = await self._http.send(request, stream=True)
        try:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise Transient(f"an answer of more than {MAX_ANSWER_BYTES} bytes from {path}")
        finally:
            await response.aclose()
        wait = retry_after(response.headers.get("Retry-After", "0"))
        return Response(response.status_code, bytes(content), wait)

    async def _trace(self, event: str, info: Json) -> None:
        """Counts new connections: behind one there may be another server than before."""
        self.connections += event == "connection.connect_tcp.complete"

    async def models(self) -> dict[str, int | None]:
        """Returns the context in tokens of each model served, None if the server hides it.

        Raises UsageError if it lists no models, or something else.
        """
        answer = await self.request("GET", "/v1/models", what="to list its models")
        try:
            found = {model["id"]: model.get("max_model_len") for model in answer["data"]}
        except (*MALFORMED, AttributeError):
            found = {}
        named = all(isinstance(name, str) and name for name in found)
        contexts = [context for context in found.values() if context is not None]
        if not found or not named or not all(type(n) is int and n > 1 for n in contexts):
            raise UsageError(f"{self.key}: {self.url} is not a vLLM server: it lists no models")
        return found

    async def patiently(
        self, ask: Callable[[], Awaitable[Answer]], at_start: bool = False
    ) -> Answer:
        """Returns what `ask()` returns, called again after every Transient failure.

        Raises RunError once failures have gone on for the client's patience, or for START_SECONDS
        `at_start` of a run.
        """
        patience = Patience(START_SECONDS if at_start else self.patience)
        while True:
            try:
                return await ask()
            except Transient as failure:
                delay = patience.after(failure)
                if patience.is_out:
                    raise self.gave_up(failure, at_start) from None
                if patience.failures == 1:
                    logger.warning("%s: %s; trying again", self.name, self.in_a_line(str(failure)))
                await asyncio.sleep(delay)

    def gave_up(self, failure: Transient, at_start: bool = False) -> RunError:
        """Returns the error that ends a run after the last of many failures."""
        limit = f"{self.patience:g} seconds ({self.section}.patience)"
        if at_start:
            limit = f"{START_SECONDS:g} seconds"
        reason = self.in_a_line(str(failure))
        return RunError(
            f"{self.name}: {reason}, for {limit}: look at its log, start it again ({self.docs}) "
            f"or correct {self.key}, then run the same command to go on"
        )

    def _detail(self, response: "Response") -> str:
        """Returns what the server says, in one line."""
        text = response.content.decode("utf-8", "replace")
        return self.in_a_line(text) or httpx2.codes.get_reason_phrase(response.status)

    def in_a_line(self, text: str) -> str:
        """Returns text in one printable line without the key, which some servers repeat."""
        return one_line(text if self._key is None else masked(text, self._key))[:300]


@cache
def _trusted() -> ssl.SSLContext:
    """Returns the certificates that all clients trust; reading them takes longer than a request."""
    return httpx2.create_ssl_context()


def masked(text: str, key: str) -> str:
    """Replaces a key, and every part of it that is long enough to matter, in a text."""
    for length in range(len(key), min(SHOWN_OF_KEY, len(key) - 1), -1):
        for first in range(len(key) - length + 1):
            text = text.replace(key[first : first + length], "[key]")
    return text


def read_log_prob(value: Json) -> float:
    """Returns a log-prob of an answer, minus infinity for vLLM's sign of it.

    Raises ValueError if it cannot be one: not a number, not finite, or above 0 by more than
    rounding.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a log-prob, got {shown(value)}")
    if value == NO_LOG_PROB:
        return -math.inf
    if not NO_LOG_PROB < value <= ROUNDING:  # nor is NaN, nor an integer too large for a float
        raise ValueError(f"expected a log-prob of at most 0, got {shown(value)}")
    return min(float(value), 0.0)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raises Transient, for an answer that is `what`, if reading it in the block goes wrong."""
    try:
        yield
    except MALFORMED as error:
        raise Transient(what) from error


def backoff(failures: int) -> float:
    """Returns seconds that double from FIRST_DELAY to LONGEST_DELAY, less up to half at random.

    So the requests of several runs do not come back together.
    """
    longest = min(FIRST_DELAY * 2.0 ** min(failures, 16), LONGEST_DELAY)
    return _jitter.uniform(longest / 2, longest)


def retry_after(value: str) -> float:
    """Returns the seconds that a header Retry-After asks for, as a number or as a date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (*MALFORMED, OverflowError):
        return 0.0


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Returns the event loop of all requests, which runs in a thread until the process ends."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop


def start(coroutine: Coroutine[Any, Any, Answer]) -> Future[Answer]:
    """Starts a coroutine in the event loop of all requests and returns its future."""
    return asyncio.run_coroutine_threadsafe(coroutine, event_loop())


def wait(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """Returns what a coroutine returns, run in the event loop of all requests."""
    future = start(coroutine)
    try:
        return future.result()
    finally:
        future.cancel()  # after an interrupt; a future that is done stays as it is
