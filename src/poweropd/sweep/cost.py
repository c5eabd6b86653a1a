"""What runs will cost, said before they start: steps, tokens, FLOPs, time if it is known, memory.

FLOPs and memory are those of `poweropd plan`, without a look at the prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median

import torch

from poweropd.config import Config
from poweropd.errors import UsageError
from poweropd.models.devices import peak_flops_of
from poweropd.plan.checks import Hub
from poweropd.plan.command import Options, recipe_scenario
from poweropd.plan.memory import GIB
from poweropd.runs.directory import RunDirectory
from poweropd.sweep.jobs import Training
from poweropd.training import gradient_noise


@dataclass(frozen=True)
class RunCost:
    """What is left of one run: steps, completions to sample, and of a step FLOPs and memory.

    FLOPs and bytes are None if they cannot be estimated, and `unknown` says why.
    """

    training: Training
    steps: int
    completions: int  # of steps and measurements
    flops: float | None  # of scoring and update in a step
    peak: int | None  # bytes on one device
    unknown: str = ""

    @property
    def longest(self) -> int:
        """Returns the tokens of the longest completion."""
        return self.training.config.rollout.longest


def run_cost(training: Training, hub: Hub) -> RunCost:
    """Returns what is left of a run. Nothing of its models but their configs is read."""
    config = training.config
    steps = training.steps - training.directory.steps_done()
    completions = steps * config.train.prompts_per_step * config.rollout.per_prompt
    left = [one for one in training.measurements if one not in training.points()]
    completions += sum(gradient_noise.PROMPTS * one.batches for one in left)
    completions += held_out_completions(config)
    try:
        scenario = recipe_scenario(config, Options(), hub)
        setup = scenario.setup(1)
        flops = scenario.update_flops(recomputed=True).total
        return RunCost(training, steps, completions, flops, scenario.memory_of(setup).peak)
    except UsageError as error:
        return RunCost(training, steps, completions, None, None, str(error))


def held_out_completions(config: Config) -> int:
    """Returns the completions of the last evaluation on held-out prompts, if there is one."""
    section = config.evaluate
    if section is None or section.divergence is None:
        return 0
    count = config.data.holdout
    return section.divergence.n * min(count, section.divergence.limit or count)


def cost_lines(trainings: Sequence[Training], parallel: int) -> list[str]:
    """Returns what the runs that are left cost together, as lines for a terminal."""
    hub = Hub()
    costs = [run_cost(one, hub) for one in trainings if not one.is_finished()]
    if not costs:
        return ["Every run is finished: nothing is left to do."]
    steps, completions = sum(c.steps for c in costs), sum(c.completions for c in costs)
    tokens = sum(cost.completions * cost.longest for cost in costs)
    count = "1 run is" if len(costs) == 1 else f"{len(costs)} runs are"
    lines = [
        f"{count} left: {steps:,} optimizer steps, {completions:,} completions, at "
        f"most {tokens:,} tokens to sample (benchmarks not counted).",
        *_work(costs, steps, seconds_of_a_step([one.directory for one in trainings])),
        *_memory(costs, parallel),
    ]
    if all(cost.training.config.evaluate is None for cost in costs):
        lines.append(
            "Nothing will be evaluated: the recipe has no section evaluate and no data.holdout."
        )
    return lines


def _work(costs: Sequence[RunCost], steps: int, seconds: float | None) -> list[str]:
    """Returns FLOPs, and the time by the seconds of a step so far or by the GPU's peak."""
    known = [cost.flops * cost.steps for cost in costs if cost.flops is not None]
    lines = []
    if len(known) == len(costs):
        text = f"Scoring and update: {sum(known) / 1e12:,.4g} TFLOPs"
        assumed = Options().utilization
        peak = peak_flops_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if peak is not None:
            hours = sum(known) / (assumed * peak) / 3600
            text += f", {hours:.2g} hours at {assumed:.0%} of this GPU's peak, assumed"
        lines.append(f"{text}.")
    if seconds is None:
        return [*lines, "Time: not known before the first steps of a run."]
    whole = timedelta(seconds=round(seconds * steps))
    return [*lines, f"Time: about {whole} of steps, at the {seconds:.3g} s of one so far."]


def seconds_of_a_step(directories: Sequence[RunDirectory]) -> float | None:
    """Returns the median over the steps that are done in run directories; None without any."""
    rows = [row for directory in directories for row in directory.metrics()]
    found = [row["seconds/step"] for row in rows if row.get("seconds/step")]
    return median(found) if found else None


def _memory(costs: Sequence[RunCost], parallel: int) -> list[str]:
    """Returns the largest run's memory, times the runs that share a device."""
    unknown = next((cost.unknown for cost in costs if cost.unknown), "")
    if unknown:
        return [f"Memory: not known ({unknown})."]
    peak = max(cost.peak or 0 for cost in costs) / GIB
    gpus = torch.cuda.device_count()
    together = min(len(costs), math.ceil(parallel / max(1, gpus)))
    text = f"Memory: {peak:.2g} GiB for a run, as poweropd plan counts it for a GPU"
    if together > 1:
        text += f"; {together * peak:.2g} GiB for the {together} that share a device"
    if gpus:
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        text += f", which has {total:.3g} GiB"
    return [f"{text}."]
