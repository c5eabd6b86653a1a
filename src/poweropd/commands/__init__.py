"""The command line: one file per command, also as `python -m poweropd`.

Exit status: 0 done; 1 the run failed; 2 wrong usage, recipe or input (one line, no traceback);
128 + n stopped by signal n, with a checkpoint written.
"""

import logging
import sys
from typing import Annotated

import typer

from poweropd import __version__
from poweropd.commands import bench, demo, doctor, init, plan, push, report, sweep, train, tune
from poweropd.commands import eval as evaluation
from poweropd.errors import RunError, UsageError, one_line
from poweropd.terminal import log_handler

LONGEST_MESSAGE = 390  # characters

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(init.init)
app.command()(train.train)
app.command("eval")(evaluation.eval_command)
app.command()(plan.plan)
app.command()(tune.tune)
app.command()(demo.demo)
app.command()(report.report)
app.command("sweep")(sweep.sweep_command)
app.command(hidden=True)(sweep.sweep_run)
app.command()(bench.bench)
app.command()(push.push)
app.command()(doctor.doctor)


def _version(asked: bool) -> None:
    """Prints the version and ends, if it was asked for."""
    if asked:
        typer.echo(f"poweropd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """On-policy distillation of language models with bounded token rewards."""


def main() -> None:
    """Runs the command line; the user's mistakes are one line and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[log_handler()])
    for library in ("accelerate", "datasets", "httpx2", "httpcore2", "transformers"):
        logging.getLogger(library).setLevel(logging.WARNING)
    sys.path.insert(0, "")  # a user's own module:function lies in the current directory
    try:
        app()
    except UsageError as error:
        sys.exit(_say(error, 2))
    except RunError as error:
        sys.exit(_say(error, 1))
    except OSError as error:  # a full disk, a file that may not be read or written
        sys.exit(_say(f"{error.filename or 'a file'}: {error.strerror or error}", 1))


def _say(error: object, status: int) -> int:
    """Prints an error as one line of bounded length; returns the exit status."""
    text = one_line(str(error))
    if len(text) > LONGEST_MESSAGE:  # its beginning says what is wrong, its end what to do
        text = f"{text[: LONGEST_MESSAGE - 120]} ... {text[-110:]}"
    typer.echo(f"error: {text}", err=True)
    return status
