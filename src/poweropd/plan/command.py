"""Makes the plan of `poweropd plan`: all that is known of a run before it starts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from poweropd.config import Config
from poweropd.errors import UsageError
from poweropd.models.devices import GPUS, Gpu
from poweropd.plan import checks
from poweropd.plan.estimate import Advice, CostEstimate, Scenario, Workload
from poweropd.plan.memory import GIB
from poweropd.plan.throughput import Measured, Throughput
from poweropd.runs.files import write_json

PAPER_PROMPT = 128  # tokens, as Appendix B of arXiv:2606.17199 counts them


@dataclass(frozen=True)
class Options:
    """What a plan assumes of hardware and data beside the recipe."""

    gpu: str = "H100"
    gpu_memory: float | None = None  # GiB, instead of the GPU's own
    tflops: float | None = None  # peak, instead of the GPU's own
    utilization: float = 0.4  # share of the peak that scoring and update reach
    tokens_per_second: float | None = None  # completion tokens that one GPU samples
    measured: Path | None = None  # a run directory
    prompt_tokens: int | None = None  # mean
    completion_tokens: int | None = None  # mean
    gpus: int | None = None
    compare: Sequence[str] = ()

    def gpu_bytes(self) -> float:
        return (self.gpu_memory or self._gpu().memory) * GIB

    def throughput(self) -> Throughput:
        """Returns the speed that is given or assumed if no run was measured."""
        peak = self.tflops * 1e12 if self.tflops else self._gpu().peak_flops
        what = "--tflops" if self.tflops else f"an {self.gpu}'s peak"
        source = f"at {self.utilization:.0%} of {peak / 1e12:.0f} TFLOP/s ({what}), assumed"
        return Throughput(self.tokens_per_second, self.utilization * peak, 0.0, source)

    def _gpu(self) -> Gpu:
        found = {name.lower(): gpu for name, gpu in GPUS.items()}
        if self.gpu.lower() not in found:
            raise UsageError(
                f"--gpu: expected one of {', '.join(GPUS)}, got {self.gpu!r}; for another one "
                "give --gpu-memory GIB and --tflops PEAK"
            )
        return found[self.gpu.lower()]


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts."""

    config: Config
    inspected: checks.Inspected
    workload: Workload
    prompt_source: str  # where the mean length of a prompt comes from
    throughput: Throughput
    gpu_bytes: float
    gpus_needed: int | None  # None: no number of them is enough
    estimates: list[CostEstimate]  # the first one is for the recipe's own objective
    advice: list[Advice]

    @property
    def failed(self) -> list[checks.PlanCheck]:
        return [check for check in self.inspected.checks if check.status == "failed"]

    def to_dict(self) -> dict[str, object]:
        steps = self.config.train.steps
        return {
            "models": {
                role: {
                    "name": model.name,
                    **asdict(model.geometry),
                    "parameters": model.geometry.parameters,
                    "source": model.source,
                }
                for role, model in self.inspected.models.items()
            },
            "checks": [asdict(check) for check in self.inspected.checks],
            "first_prompt": self.inspected.first_prompt,
            "workload": asdict(self.workload) | {"prompt_source": self.prompt_source},
            "throughput": asdict(self.throughput),
            "gpu_bytes": self.gpu_bytes,
            "gpus_needed": self.gpus_needed,
            "advice": [asdict(advice) for advice in self.advice],
            "steps": steps,
            "estimates": [estimate.to_dict(steps) for estimate in self.estimates],
        }

    def write(self, path: Path) -> None:
        write_json(path, self.to_dict())


def make_plan(config: Config, options: Options) -> Plan:
    """Plans a recipe. Raises UsageError for options or models that cannot be planned."""
    gpu_bytes, throughput = options.gpu_bytes(), options.throughput()
    found = checks.inspect(config)
    if config.train.epochs is not None:
        if not found.prompt_lengths:
            why = next(check.detail for check in found.checks if check.name == "prompts")
            raise UsageError(
                f"train.epochs: the prompts cannot be counted ({why}); set train.steps"
            )
        config = config.with_steps(len(found.prompt_lengths) - config.data.holdout)
    measured = Measured.read(options.measured) if options.measured else None
    completion = options.completion_tokens or (measured.mean_length if measured else None)
    prompt, prompt_source = _prompt_length(options, found)
    workload = Workload.of(config, prompt, completion)
    if measured:
        throughput = measured_throughput(measured, prompt, str(options.measured))
    scenario = Scenario.of(config, checks.geometries(found.models), workload, gpu_bytes)
    kinds = dict.fromkeys([config.objective.kind, *options.compare])
    scenarios = [scenario.with_kind(kind) for kind in kinds]
    needed = scenario.gpus_needed()
    gpus = options.gpus or needed or 1
    return Plan(
        config=config,
        inspected=found,
        workload=workload,
        prompt_source=prompt_source,
        throughput=throughput,
        gpu_bytes=gpu_bytes,
        gpus_needed=needed,
        estimates=[each.cost(throughput, gpus) for each in scenarios],
        advice=scenario.advice(options.gpus or 1),
    )


def recipe_scenario(config: Config, options: Options, hub: checks.Hub) -> Scenario:
    """Returns what a recipe's cost depends on, its prompts as long as they are given or assumed.

    Only the configs of its models are read. Raises UsageError for models that cannot be planned.
    """
    models = checks.find_models(config, hub)
    prompt = options.prompt_tokens or PAPER_PROMPT
    workload = Workload.of(config, prompt, options.completion_tokens)
    return Scenario.of(config, checks.geometries(models), workload, options.gpu_bytes())


def measured_throughput(measured: Measured, prompt: float, source: str) -> Throughput:
    """Returns the speed of a run on one device, from its own models and mean lengths."""
    config = measured.config
    models = checks.find_models(config, checks.Hub())
    workload = Workload.of(config, prompt, measured.mean_length)
    scenario = Scenario.of(config, checks.geometries(models), workload, gpu_bytes=0)
    return Throughput(
        rollout=workload.tokens / measured.rollout,
        flops=scenario.update_flops(recomputed=True).total / measured.busy,
        sync=measured.sync,
        source=f"as measured in {source}, on one device",
    )


def _prompt_length(options: Options, found: checks.Inspected) -> tuple[float, str]:
    """Returns the mean length of a prompt in tokens, and where it comes from."""
    if options.prompt_tokens:
        return options.prompt_tokens, "given"
    if found.mean_prompt is not None:
        return found.mean_prompt, "mean of the prompts"
    return PAPER_PROMPT, "assumed, as the paper does"
