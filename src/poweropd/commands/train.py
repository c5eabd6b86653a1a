"""`poweropd train`: trains the student of a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from poweropd.commands.options import Overrides, load_recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")], overrides: Overrides = None
) -> None:
    """Trains the student of a recipe; an unfinished run directory goes on from its checkpoint."""
    config = load_recipe(recipe, overrides)
    from poweropd.training.trainer import Trainer

    result = Trainer(config).train()
    if result.interrupted_by is not None:
        command = " ".join(["poweropd train", str(recipe), *(overrides or [])])
        typer.echo(f"stopped after step {result.steps}; to go on: {command}", err=True)
        raise typer.Exit(128 + result.interrupted_by)
    typer.echo(f"run directory: {result.run_dir}\nstudent: {result.final}")
