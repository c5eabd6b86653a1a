"""What ends a run from outside: SIGINT and SIGTERM, and the end of another of its processes."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributed import DistError

from poweropd.errors import RunError, one_line

logger = logging.getLogger("poweropd")


@contextmanager
def deferred() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of stopping; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning(
            "%s: finishing this step, then writing a checkpoint; once more to stop at once",
            signal.Signals(number).name,
        )

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# How gloo, which raises plain RuntimeErrors, begins what it says of a connection.
_GLOO = ("gloo", "Connection closed by peer", "Connection reset by peer")


@contextmanager
def advised() -> Iterator[None]:
    """Turns the error of a collective whose other side is gone into a RunError that says so."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and not any(word in str(error) for word in _GLOO):
            raise
        raise RunError(
            "another process of this run has ended, or cannot be reached "
            f"({one_line(str(error))[:120]}): see what it said; then start the same command on all "
            "nodes: the run goes on from its last checkpoint"
        ) from error
