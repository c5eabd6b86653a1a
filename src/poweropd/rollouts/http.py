"""A server that may be away for a while: JSON over HTTP, repeated until it is back."""

import logging
import random
import time
import weakref
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

import httpx2

from poweropd.errors import RunError
from poweropd.net import api_key, base_url

logger = logging.getLogger("poweropd")
Answer = TypeVar("Answer")

CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
RETRIED = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, *range(500, 600)}


class Unavailable(Exception):
    """The server did not answer as it should; it may later."""


class JsonServer:
    """`timeout` bounds one request and `patience` how long the server may be away, in seconds.

    The API key is read from the environment variable `api_key_env`. Raises UsageError where
    that has none; RunError, naming the URL, where the server refuses a request or stays away.
    """

    def __init__(
        self, url: str, timeout: float, patience: float, api_key_env: str | None = None
    ) -> None:
        self.url, self.patience = base_url(url), patience
        key = api_key("rollout.server.api_key_env", api_key_env)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx2.Client(
            base_url=self.url,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(timeout, connect=CONNECT_SECONDS),
            limits=limits,
        )
        weakref.finalize(self, self.client.close)

    def get(self, path: str) -> Any:
        return self._request("GET", path)

    def post(self, path: str, body: dict[str, Any], **query: str) -> Any:
        return self._request("POST", path, json=body, params=query)

    def is_healthy(self) -> bool:
        try:
            return self.client.get("/health").status_code == HTTPStatus.OK
        except httpx2.TransportError:
            return False

    def _request(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self.client.request(method, path, **options)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        status = response.status_code
        if status in RETRIED:
            raise Unavailable(f"HTTP {status} from {path}: {_detail(response)}")
        if status == HTTPStatus.NOT_FOUND and not path.startswith("/v1/"):
            raise RunError(
                f"{self.url}{path}: not found: start vLLM with VLLM_SERVER_DEV_MODE=1 in its "
                "environment, on an address that only you can reach"
            )
        if status >= HTTPStatus.BAD_REQUEST:
            raise RunError(f"{self.url}{path}: HTTP {status}: {_detail(response)}")
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise Unavailable(f"no JSON from {path}: {_detail(response)}") from error

    def patiently(self, ask: Callable[[], Answer]) -> Answer:
        """`ask()`, again after every Unavailable, with growing pauses, until patience is out."""
        pause, since = FIRST_PAUSE_SECONDS, None
        while True:
            try:
                return ask()
            except Unavailable as error:
                since = since or time.monotonic()
                waited = time.monotonic() - since
                if waited > self.patience:
                    raise RunError(
                        f"{self.url}: no good answer for {waited:.0f} s (last: {error}): start the "
                        "server again and repeat the command; the run goes on from its checkpoint"
                    ) from error
                logger.warning("%s: %s; trying again", self.url, error)
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _detail(response: httpx2.Response) -> str:
    """What the server says, in one line."""
    return " ".join(response.text.split())[:300]
