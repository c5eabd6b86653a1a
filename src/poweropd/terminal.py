"""The consoles of all commands: text is shown as it is, and never read as rich's markup."""

import logging

from rich.console import Console
from rich.logging import RichHandler

from poweropd.errors import one_line


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Returns a console for names of files and models, in which brackets are brackets."""
    return Console(stderr=stderr, quiet=quiet, markup=False)


def print_line(console: Console, text: str) -> None:
    """Prints a line as it is, however long, above the bars where there are any."""
    console.print(text, soft_wrap=True, highlight=False)


class LineHandler(logging.Handler):
    """Prints each message as one line, as a log file needs it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the level and the message of a record."""
        print_line(self.console, f"{record.levelname:<8} {one_line(self.format(record))}")


def log_handler() -> logging.Handler:
    """Returns what shows the messages of this package on the standard error."""
    console = make_console(stderr=True)
    if console.is_terminal:
        return RichHandler(console=console, show_path=False, show_time=False)
    return LineHandler(console)
