"""Finds where a model is, before anything is loaded: in the package, in a directory, on the Hub."""

from pathlib import Path

from poweropd import embedded
from poweropd.embedded import EMBEDDED_PREFIX
from poweropd.errors import UsageError, shown


def resolve(name: str) -> str:
    """Returns the directory of an embedded model, and any other name or path as it is."""
    if name.startswith(EMBEDDED_PREFIX):
        try:
            return str(embedded.path(name.removeprefix(EMBEDDED_PREFIX)))
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if not may_be_on_the_hub(name):
        raise UsageError(f"{shown(name)[1:-1]}: no such model directory")
    return name


def may_be_on_the_hub(name: str) -> bool:
    """Returns whether a name has the form NAME or OWNER/NAME, which no clear path has."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
