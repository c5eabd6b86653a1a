"""FLOPs, memory, time and cost of a run: arithmetic on geometries and a recipe."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from poweropd.config import Config
from poweropd.costs import flops, memory
from poweropd.costs.geometry import Geometry
from poweropd.errors import UsageError
from poweropd.plan.throughput import Throughput
from poweropd.sections import Lora

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Of a device's memory: the rest goes to the CUDA context and to what the allocator cannot use.
USABLE = 0.9
KINDS = ("sampled", "full_vocab")


@dataclass(frozen=True)
class Workload:
    """The completions of a step and their lengths in tokens."""

    completions: int
    prompt: int
    completion: int  # what is counted on average
    longest: int  # what memory must hold

    @classmethod
    def of(cls, config: Config, prompt: float, completion: float | None) -> "Workload":
        longest = config.rollout.max_new_tokens
        return cls(
            completions=config.train.prompts_per_step * config.rollout.per_prompt,
            prompt=round(prompt),
            completion=round(min(completion or longest, longest)),
            longest=longest,
        )

    @property
    def tokens(self) -> int:
        return self.completions * self.completion

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(read, trained) of each; what is read counts the last token, as the paper does."""
        return [(self.prompt + self.completion, self.completion)] * self.completions


@dataclass(frozen=True)
class Estimate:
    """One objective on one device of several."""

    kind: str
    paper: flops.UpdateFlops
    true: flops.UpdateFlops  # as many as a utilisation is measured by
    done: float  # FLOPs of scoring and update, with what checkpointing computes again
    memory: memory.Memory
    seconds: dict[str, float | None]  # of a step by phase; None where it is not known
    gpus: int

    @property
    def paper_flops(self) -> float:
        """The paper leaves the heads out of the sampled update, and counts both otherwise."""
        return self.paper.total if self.kind == "full_vocab" else self.paper.bodies

    @property
    def step_seconds(self) -> float | None:
        """None unless every phase is known."""
        known = [s for s in self.seconds.values() if s is not None]
        return sum(known) if len(known) == len(self.seconds) else None

    def gpu_hours(self, steps: int) -> float | None:
        seconds = self.step_seconds
        return None if seconds is None else seconds * steps * self.gpus / 3600

    def to_dict(self, steps: int) -> dict[str, Any]:
        """Plain values: FLOPs, bytes, seconds."""
        return {
            "kind": self.kind,
            "flops": {
                "paper": asdict(self.paper) | {"counted": self.paper_flops},
                "true": asdict(self.true) | {"total": self.true.total},
            },
            "memory_bytes": {part.name: part.bytes for part in self.memory.parts},
            "peak_bytes": self.memory.peak,
            "peak_phase": self.memory.peak_phase,
            "seconds": {**self.seconds, "step": self.step_seconds},
            "gpus": self.gpus,
            "gpu_hours": self.gpu_hours(steps),
        }


def estimate(
    config: Config,
    student: Geometry,
    teacher: Geometry,
    workload: Workload,
    throughput: Throughput,
    gpus: int,
) -> Estimate:
    sequences = workload.sequences
    passes = passes_of(config)
    done = flops.update(student, teacher, sequences, with_recomputing(config, passes)).total
    return Estimate(
        kind=config.objective.kind,
        paper=flops.paper_update(
            student, teacher, workload.completions, workload.prompt, workload.completion
        ),
        true=flops.update(student, teacher, sequences, passes),
        done=done,
        memory=memory.of_step(student, teacher, setup(config, student, workload, gpus)),
        seconds=throughput.seconds(workload.tokens / gpus, done / gpus),
        gpus=gpus,
    )


def passes_of(config: Config) -> flops.Passes:
    lora, reward = config.model.lora is not None, config.reward.create()
    return flops.Passes.of(lora, reward.needs_statistics)


def with_recomputing(config: Config, passes: flops.Passes) -> flops.Passes:
    return passes.recomputing() if config.model.gradient_checkpointing else passes


def setup(
    config: Config, student: Geometry, workload: Workload, gpus: int = 1, device: str = "cuda"
) -> memory.Setup:
    lora = config.model.lora
    return memory.Setup(
        completions=math.ceil(workload.completions / gpus),
        prompt=workload.prompt,
        completion=workload.longest,
        max_tokens=config.train.max_tokens_per_batch,
        teacher_max_tokens=config.only_teacher.max_tokens_per_batch,
        compute=BYTES[config.model.dtype],
        master=BYTES[config.model.master_dtype],
        teacher=BYTES[config.only_teacher.dtype],
        rollout_batch=config.rollout.batch_size,
        reads_along=config.needs_local_teacher is not None,
        checkpointing=config.model.gradient_checkpointing,
        lora_rank=lora.r if lora else None,
        lora_parameters=lora_parameters(student, lora) if lora else 0,
        device=device,
    )


def lora_parameters(geometry: Geometry, lora: Lora) -> int:
    targets = geometry.linears if lora.target_modules == "all-linear" else lora.target_modules
    widths = [sum(shape) for name, shape in geometry.linears.items() if name in targets]
    return geometry.layers * lora.r * sum(widths)


def with_kind(config: Config, kind: str) -> Config:
    """The recipe with another objective.kind. Raises UsageError for one that it cannot have."""
    if kind not in KINDS:
        raise UsageError(f"--compare: expected some of {','.join(KINDS)}, got {kind!r}")
    objective = config.objective.model_copy(update={"kind": kind})
    return Config.from_dict(config.model_copy(update={"objective": objective}).model_dump())


def gpus_needed(
    config: Config, student: Geometry, teacher: Geometry, workload: Workload, gpu_bytes: float
) -> int | None:
    """The fewest GPUs that hold a step, or None: each holds both models, so more of them only
    share the completions."""
    for gpus in range(1, workload.completions + 1):
        step = memory.of_step(student, teacher, setup(config, student, workload, gpus))
        if step.peak <= USABLE * gpu_bytes:
            return gpus
    return None


def advice(student: Geometry, teacher: Geometry, base: memory.Setup) -> list[tuple[str, int]]:
    """Settings that lower the peak, each alone, as (override, peak in bytes), lowest first."""
    peak = memory.of_step(student, teacher, base).peak
    half = max(base.length, base.max_tokens // 2)
    adapter = lora_parameters(student, Lora())
    options = {
        f"train.max_tokens_per_batch={half}": replace(base, max_tokens=half),
        "model.gradient_checkpointing=true": replace(base, checkpointing=True),
        "model.lora={}": replace(base, lora_rank=Lora().r, lora_parameters=adapter),
    }
    peaks = {key: memory.of_step(student, teacher, s).peak for key, s in options.items()}
    lower = [(key, other) for key, other in peaks.items() if other < peak]
    return sorted(lower, key=lambda pair: pair[1])
