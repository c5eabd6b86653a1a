"""The consoles of all commands: text is shown as it is, and never read as rich's markup."""

from rich.console import Console


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Returns a console for names of files and models, in which brackets are brackets."""
    return Console(stderr=stderr, quiet=quiet, markup=False)
