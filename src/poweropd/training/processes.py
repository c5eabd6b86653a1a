"""What a run says when one of its processes is gone."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError

from poweropd.errors import RunError, one_line

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
