"""`poweropd demo`: three rewards on the embedded pair."""

from pathlib import Path
from typing import Annotated

import typer


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
    # Importing torch takes seconds: what will happen is said before.
    typer.echo(
        "The embedded student learns from its teacher with three rewards, log_ratio, clip and "
        "power, two\nseeds each, in two processes. This usually takes about four minutes, less "
        "with --steps.\n"
        f"Run directories: {out}/REWARD-seedN; after an interruption, the same command goes on."
    )
    from poweropd.sweep import demo

    raise typer.Exit(demo.run_demo(out, steps=steps, num_problems=problems, json_file=json_file))
