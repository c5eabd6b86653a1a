"""Options of `poweropd sweep`, and of `poweropd sweep-run`, which is one of its processes."""

import json
from pathlib import Path
from typing import Annotated

import typer

from poweropd.commands.options import DryRun, check_batches, load_recipe


def sweep_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For all runs.")
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2,...", help="Values to try; several multiply."),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(metavar="'KEY=V KEY=V'", help="One cell more, by one or more overrides."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each cell, from the recipe's seed on.")
    ] = 1,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Holds the run directories; runs/RECIPE-sweep if absent.")
    ] = None,
    snr: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="K",
            help="Measure gradients on K batches of 32 prompts, say 32.",
        ),
    ] = 0,
    best: Annotated[
        bool, typer.Option("--best", help="Figures of each run's best step, not its last.")
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="CELL",
            help="The row that the others are compared with; the first --case if absent.",
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe's variants, each with several seeds, and compare them in one table."""
    check_batches(snr)
    load_recipe(recipe, overrides)
    from poweropd.config.shipped import find_recipe
    from poweropd.sweep import cells, jobs

    folder = out or Path(f"runs/{recipe.stem}-sweep")
    trainings = cells.trainings(
        find_recipe(recipe),
        overrides or [],
        over or [],
        case or [],
        seeds=seeds,
        out=folder,
        measure=jobs.at_both_ends(snr),
    )
    compared = cells.baseline_cell(trainings, len(case or []), baseline)
    from poweropd.sweep import command

    if snr:
        command.check_snr(trainings)
    if dry_run:
        command.print_trainings(trainings, parallel)
    else:
        raise typer.Exit(command.run_sweep(folder, trainings, parallel, snr, best, compared))


def sweep_run(
    configs: list[Path],
    measure: Annotated[list[str] | None, typer.Option(metavar="JSON")] = None,
    trial: Annotated[bool, typer.Option("--trial")] = False,
) -> None:
    """Train runs of a sweep, by their directories' config.yaml, and measure them on their way."""
    from poweropd.sweep import jobs, process

    wanted = [jobs.Measurement(**json.loads(text)) for text in measure or []]
    for config in configs:
        result = process.train_and_measure(config, wanted, trial)
        if result.interrupted_by is not None:
            raise typer.Exit(128 + result.interrupted_by)
