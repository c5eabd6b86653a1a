"""`poweropd train`: trains the student of a recipe."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poweropd.commands.options import Overrides, load_recipe

if TYPE_CHECKING:
    from poweropd.config import Config

logger = logging.getLogger("poweropd")


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")], overrides: Overrides = None
) -> None:
    """Trains the student of a recipe; an unfinished run directory goes on from its checkpoint."""
    config = load_recipe(recipe, overrides)
    _announce(config)
    from poweropd.training.trainer import Trainer

    result = Trainer(config).train()
    if result.interrupted_by is not None:
        command = " ".join(["poweropd train", str(recipe), *(overrides or [])])
        typer.echo(f"stopped after step {result.steps}; to go on: {command}", err=True)
        raise typer.Exit(128 + result.interrupted_by)
    typer.echo(f"run directory: {result.run_dir}\nstudent: {result.final}")


def _announce(config: "Config") -> None:
    """Says what begins, since the imports and the models take their time."""
    if os.environ.get("RANK", "0") == "0":  # one of the processes of a launch
        names = (config.model.student, config.teacher_names(), config.run.dir)
        logger.info("%s learns from %s in %s", *names)
