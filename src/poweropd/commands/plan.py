"""`poweropd plan`: checks a recipe and says what it costs."""

from pathlib import Path
from typing import Annotated

import typer

from poweropd.commands.options import Overrides
from poweropd.errors import UsageError


def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="The GPU whose memory and peak FLOP/s count, such as A100.")
    ] = "H100",
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="Memory in GiB, instead of the GPU's own.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Peak TFLOP/s, instead of the GPU's own.")
    ] = None,
    utilization: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Share of the peak that scoring and update reach."),
    ] = 0.4,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Completion tokens that one GPU samples.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="A run directory whose steps say how fast it goes.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean prompt length in tokens.")
    ] = None,
    completion_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Mean completion length in tokens (default: rollout.max_new_tokens)."
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs (default: as many as are needed).")
    ] = None,
    compare: Annotated[
        str, typer.Option(help="Objectives to compare, such as sampled,full_vocab.")
    ] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the plan to this file, too.")
    ] = None,
) -> None:
    """Checks a recipe and says what it costs, before any weight is loaded."""
    from poweropd.config import Config
    from poweropd.plan import command, table

    options = command.Options(
        gpu=gpu,
        gpu_memory=gpu_memory,
        tflops=tflops,
        utilization=utilization,
        tokens_per_second=tokens_per_second,
        measured=measured,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        gpus=gpus,
        compare=[kind.strip() for kind in compare.split(",") if kind.strip()],
    )
    made = command.make_plan(Config.load(recipe, overrides or []), options)
    table.print_plan(made)
    if json_file is not None:
        made.write(json_file)
    if made.failed:
        raise UsageError("; ".join(f"{check.name}: {check.detail}" for check in made.failed))
