"""`poweropd tune`: a short search for alpha and learning rate."""

from pathlib import Path
from typing import Annotated

import typer

from poweropd.commands.options import DryRun, Overrides, check_batches, load_recipe
from poweropd.errors import UsageError

Numbers = Annotated[str, typer.Option(metavar="A,B,...", help="Alphas of power to try.")]
Rates = Annotated[
    str,
    typer.Option(
        metavar="R,R,...",
        help="Learning rates beside the recipe's; 4 times that and as far as needed if absent.",
    ),
]
Cases = Annotated[
    list[str] | None,
    typer.Option(
        "--case",
        metavar="'KEY=V KEY=V'",
        help="Another setting, at every rate; reward.name=log_ratio if absent.",
    ),
]


def tune(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Overrides = None,
    alphas: Numbers = "0.5,5,50,500",
    rates: Rates = "",
    case: Cases = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of each setting.")] = 32,
    metric: Annotated[
        str, typer.Option(help="What decides: reverse_kl, agreement, ..., or avg_at_k.")
    ] = "reverse_kl",
    snr: Annotated[
        int,
        typer.Option(
            min=0, metavar="K", help="Batches of 32 prompts for the gradient's SNR; 0: none."
        ),
    ] = 8,
    parallel: Annotated[int, typer.Option(min=1, help="Settings at a time.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Holds the run directories; runs/RECIPE-tune if absent.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Try alphas and learning rates for some steps each, and write the recipe to train by."""
    check_batches(snr)
    tried = {"alphas": numbers("--alphas", alphas), "rates": numbers("--rates", rates)}
    load_recipe(recipe, overrides)
    from poweropd.config.shipped import find_recipe
    from poweropd.tune import command
    from poweropd.tune.trials import Search

    search = Search(steps=steps, batches=snr, metric=metric, cases=case or [], **tried)
    folder = out or Path(f"runs/{recipe.stem}-tune")
    raise typer.Exit(
        command.run_tune(find_recipe(recipe), overrides or [], search, folder, parallel, dry_run)
    )


def numbers(option: str, text: str) -> list[float]:
    """Returns the numbers above 0 of a text such as "0.5,5"; raises UsageError for another."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0.0]
    if not all(0 < number < float("inf") for number in found):
        raise UsageError(f"{option}: expected numbers above 0, separated by commas, got {text}")
    return found
