"""The command line: `poweropd demo | train | eval`, also as `python -m poweropd`.

Exit status: 0 done; 1 the run failed; 2 wrong usage, recipe or input (one line, no traceback);
128 + n stopped by signal n, with a checkpoint written.
"""

import errno
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from poweropd.errors import RunError, UsageError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="On-policy distillation of language models with bounded token rewards.",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as reward.alpha=10.")
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")], overrides: Overrides = None
) -> None:
    """Distil the student of a recipe; on an unfinished run directory, go on from its checkpoint."""
    from poweropd.config import Config
    from poweropd.trainer import Trainer

    result = Trainer(Config.load(recipe, overrides or [])).train()
    if result.interrupted_by is not None:
        command = " ".join(["poweropd train", str(recipe), *(overrides or [])])
        typer.echo(f"stopped after step {result.steps}; to go on: {command}", err=True)
        raise typer.Exit(128 + result.interrupted_by)
    typer.echo(f"run directory: {result.run_dir}\nstudent: {result.final}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where runs, picture and numbers go.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Fewer steps, for a quick look.")] = None,
    problems: Annotated[int, typer.Option(min=16, help="Evaluation problems.")] = 1024,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers here.")
    ] = None,
) -> None:
    """Distil the embedded student with three rewards and compare them, in about four minutes."""
    from poweropd import demo as showcase

    showcase.run(out, steps=steps, num_problems=problems, json_file=json_file)


def main() -> None:
    """Runs the command line; the user's mistakes are one line and exit status 2."""
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)],
    )
    for library in ("accelerate", "datasets", "httpx2", "httpcore2", "transformers"):
        logging.getLogger(library).setLevel(logging.WARNING)
    sys.path.insert(0, "")  # a user's own module:function lies in the current directory
    try:
        app()
    except UsageError as error:
        sys.exit(_say(error, 2))
    except RunError as error:
        sys.exit(_say(error, 1))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        sys.exit(_say(f"{error.filename or 'a file'}: cannot write: {error.strerror}", 1))


def _say(error: object, status: int) -> int:
    typer.echo(f"error: {error}", err=True)
    return status
