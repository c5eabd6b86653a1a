"""Arguments that several commands take, and what they check before anything slow is imported."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poweropd.errors import UsageError

if TYPE_CHECKING:
    from poweropd.config import Config

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as reward.alpha=10.")
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would run and what it costs.")
]


def check_batches(snr: int) -> None:
    """Raises UsageError for a number of batches of which no signal-to-noise ratio is known."""
    if snr == 1:
        raise UsageError("--snr: expected 0 or at least 2 batches, got 1")


def load_recipe(path: Path, overrides: Sequence[str] | None) -> "Config":
    """Reads a recipe and checks its paths, without torch, so that an error comes at once."""
    from poweropd.config import Config
    from poweropd.config.shipped import find_recipe

    config = Config.load(find_recipe(path), overrides or [])
    check_paths(config)
    return config


def check_paths(config: "Config") -> None:
    """Raises UsageError for a model or data of a recipe that are a path where nothing is."""
    from poweropd.data import sources
    from poweropd.models import places

    models = {"model.student": config.model.student}
    for name, teacher in config.teachers.items():
        if not teacher.servers and config.self_teacher is None:
            models[f"teacher.{name}.model" if name else "teacher.model"] = teacher.model
    for key, model in models.items():
        try:
            places.resolve(model)
        except UsageError as error:
            raise UsageError(f"{key}: {error}") from None
    sources.check_source("data.prompts", config.data.prompts)
    if config.rollout.off_policy is not None:
        sources.check_source("rollout.off_policy.file", config.rollout.off_policy.file)
