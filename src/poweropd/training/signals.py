"""SIGINT and SIGTERM wait for the end of the step."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
