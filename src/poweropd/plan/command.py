"""`poweropd plan`: everything that is known of a run before it starts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poweropd.config import Config
from poweropd.errors import UsageError
from poweropd.models import flops
from poweropd.models.devices import GPUS, Gpu
from poweropd.plan import checks
from poweropd.plan.estimate import (
    Advice,
    CostEstimate,
    Workload,
    advice,
    estimate_cost,
    gpus_needed,
    passes_of,
    setup,
    with_kind,
    with_recomputing,
)
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
    utilization: float = 0.4  # of the peak, in scoring and update
    tokens_per_second: float | None = None  # of rollouts, on one GPU
    measured: Path | None = None  # a run directory
    prompt_tokens: int | None = None  # mean
    completion_tokens: int | None = None  # mean
    gpus: int | None = None
    compare: Sequence[str] = ()

    def gpu_bytes(self) -> float:
        return (self.gpu_memory or self._gpu().memory) * GIB

    def throughput(self) -> Throughput:
        """As given or assumed, without a measured run."""
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
    config: Config
    inspected: checks.Inspected
    workload: Workload
    prompt_source: str  # where the mean length of a prompt is from
    throughput: Throughput
    gpu_bytes: float
    gpus_needed: int | None  # None: no number of them is enough
    estimates: list[CostEstimate]  # of the recipe's own objective first
    advice: list[Advice]

    @property
    def failed(self) -> list[checks.PlanCheck]:
        return [check for check in self.inspected.checks if check.status == "failed"]

    def to_dict(self) -> dict[str, Any]:
        found, steps = self.inspected, self.config.train.steps
        models = {
            "student": {"name": self.config.model.student, **asdict(found.student)},
            "teacher": {"name": self.config.only_teacher.model, **asdict(found.teacher)},
        }
        for who, geometry in (("student", found.student), ("teacher", found.teacher)):
            models[who] |= {"parameters": geometry.parameters, "source": found.sources[who]}
        return {
            "models": models,
            "checks": [asdict(check) for check in found.checks],
            "workload": asdict(self.workload) | {"prompt_source": self.prompt_source},
            "throughput": asdict(self.throughput),
            "gpu_bytes": self.gpu_bytes,
            "gpus_needed": self.gpus_needed,
            "advice": [asdict(advice) for advice in self.advice],
            "steps": steps,
            "estimates": [e.to_dict(steps) for e in self.estimates],
        }

    def write(self, path: Path) -> None:
        write_json(path, self.to_dict())


def make_plan(config: Config, options: Options) -> Plan:
    """Raises UsageError for options or models that cannot be planned."""
    gpu_bytes, throughput = options.gpu_bytes(), options.throughput()
    found = checks.inspect(config)
    student, teacher = found.student, found.teacher
    measured = Measured.read(options.measured) if options.measured else None
    completion = options.completion_tokens or (measured.mean_length if measured else None)
    prompt, prompt_source = _prompt(options, found)
    workload = Workload.of(config, prompt, completion)
    if measured:
        throughput = rates(measured, prompt, str(options.measured))
    kinds = dict.fromkeys([config.objective.kind, *options.compare])
    configs = [with_kind(config, kind) for kind in kinds]
    needed = gpus_needed(config, student, teacher, workload, gpu_bytes)
    gpus, asked = options.gpus or needed or 1, options.gpus or 1
    return Plan(
        config=config,
        inspected=found,
        workload=workload,
        prompt_source=prompt_source,
        throughput=throughput,
        gpu_bytes=gpu_bytes,
        gpus_needed=needed,
        estimates=[
            estimate_cost(c, student, teacher, workload, throughput, gpus, gpu_bytes)
            for c in configs
        ],
        advice=advice(student, teacher, setup(config, student, workload, asked, gpu_bytes), asked),
    )


def rates(measured: Measured, prompt: float, source: str) -> Throughput:
    """Rates of a measured run on one device, from its own models and mean lengths."""
    config = measured.config
    found = checks.geometries(config, checks.Hub())[:2]
    workload = Workload.of(config, prompt, measured.mean_length)
    passes = with_recomputing(config, passes_of(config))
    done = flops.update(*found, workload.sequences, passes).total
    return Throughput(
        rollout=workload.tokens / measured.rollout,
        flops=done / measured.busy,
        sync=measured.sync,
        source=f"as measured in {source}, on one device",
    )


def _prompt(options: Options, found: checks.Inspected) -> tuple[float, str]:
    if options.prompt_tokens:
        return options.prompt_tokens, "given"
    if found.mean_prompt is not None:
        return found.mean_prompt, "mean of the prompts"
    return PAPER_PROMPT, "assumed, as the paper does"
