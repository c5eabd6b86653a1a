"""`poweropd plan`: checks a recipe and says what it costs."""

from pathlib import Path
from typing import Annotated

import typer

from poweropd.commands.options import Overrides, load_recipe
from poweropd.errors import UsageError

Recipe = Annotated[Path, typer.Argument(help="A YAML recipe.")]
GpuName = Annotated[str, typer.Option(help="The GPU whose memory and peak count, such as A100.")]
GpuMemory = Annotated[
    float | None, typer.Option(min=1, help="Memory in GiB, instead of the GPU's own.")
]
PeakTflops = Annotated[
    float | None, typer.Option(min=0.001, help="Peak TFLOP/s, instead of the GPU's own.")
]
Utilization = Annotated[
    float, typer.Option(min=0.01, max=1, help="Share of the peak in scoring and update: a guess.")
]
TokensPerSecond = Annotated[
    float | None, typer.Option(min=0.001, help="Completion tokens that one GPU samples a second.")
]
MeasuredRun = Annotated[
    Path | None, typer.Option(help="A run directory whose steps say how fast it goes.")
]
PromptTokens = Annotated[int | None, typer.Option(min=1, help="Mean prompt length in tokens.")]
CompletionTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Mean completion length in tokens (default: rollout.max_new_tokens)."),
]
Gpus = Annotated[
    int | None, typer.Option(min=1, help="Number of GPUs (default: as many as are needed).")
]
Objectives = Annotated[str, typer.Option(help="Objectives to compare: sampled,full_vocab.")]
PlanFile = Annotated[Path | None, typer.Option("--json", help="Write the plan to this file, too.")]


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: GpuName = "H100",
    gpu_memory: GpuMemory = None,
    tflops: PeakTflops = None,
    utilization: Utilization = 0.4,
    tokens_per_second: TokensPerSecond = None,
    measured: MeasuredRun = None,
    prompt_tokens: PromptTokens = None,
    completion_tokens: CompletionTokens = None,
    gpus: Gpus = None,
    compare: Objectives = "",
    json_file: PlanFile = None,
) -> None:
    """Checks a recipe and says what it costs, before any weight is loaded."""
    config = load_recipe(recipe, overrides)
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
    made = command.make_plan(config, options)
    table.print_plan(made)
    if json_file is not None:
        made.write(json_file)
    if made.failed:
        raise UsageError("; ".join(f"{check.name}: {check.detail}" for check in made.failed))
