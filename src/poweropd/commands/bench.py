"""Options of `poweropd bench`."""

from pathlib import Path
from typing import Annotated

import typer

from poweropd.commands.options import DryRun, Overrides, check_batches, load_recipe


def bench(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; the embedded pair's.")] = Path(
        "recipes/bench.yaml"
    ),
    overrides: Overrides = None,
    only: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="Compare these; all if absent.")
    ] = "",
    case: Annotated[
        list[str] | None,
        typer.Option(metavar="'KEY=V KEY=V'", help="A setting of yours, beside them."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Trainings of each setting at its best rate.")
    ] = 5,
    metric: Annotated[
        str, typer.Option(help="What decides the learning rates: reverse_kl or avg_at_k.")
    ] = "reverse_kl",
    snr: Annotated[
        int,
        typer.Option(min=0, metavar="K", help="Measure gradients on K batches of 32 prompts."),
    ] = 4,
    other: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPTS", help="Prompts of another kind, on which forgetting is measured."
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Trainings at a time.")] = 1,
    series: Annotated[
        int,
        typer.Option(
            min=1,
            help="Trainings that one process does, for models that train faster than it begins.",
        ),
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Holds the run directories; runs/RECIPE-bench if absent.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Compare every reward and objective, each at its own learning rate, with intervals."""
    check_batches(snr)
    base = load_recipe(recipe, overrides)
    from poweropd.config.shipped import find_recipe
    from poweropd.data.sources import check_source
    from poweropd.sweep.bench import command, trials

    if other is None:
        other = trials.default_other(base)
    if other:
        check_source("--other", other)
    path, given = find_recipe(recipe), overrides or []
    names = [name.strip() for name in only.split(",") if name.strip()]
    settings, left_out = trials.chosen_settings(path, given, names, case or [])
    folder = out or Path(f"runs/{recipe.stem}-bench")
    wanted = trials.Bench(path, given, settings, folder, seeds, snr, other, metric)
    raise typer.Exit(
        command.run_bench(wanted, left_out, command.Running(parallel, series), dry_run)
    )
