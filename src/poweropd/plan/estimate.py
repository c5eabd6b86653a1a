"""FLOPs, memory, time and cost of a run: arithmetic on geometries and a recipe."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from poweropd.config import Config
from poweropd.config.sections import LoraConfig
from poweropd.errors import UsageError
from poweropd.models import flops
from poweropd.models.geometry import Geometry
from poweropd.plan import memory
from poweropd.plan.throughput import Throughput

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Of a device's memory: the rest goes to the CUDA context and to what the allocator cannot use.
USABLE = 0.9
KINDS = ("sampled", "full_vocab")
SAMPLES: dict[str, Literal["transformers", "vllm", "server"]] = {
    "vllm": "vllm",
    "vllm_server": "server",
}
# bitsandbytes: four bits and a float32 scale for 64 of them; eight bits, scales by row.
QUANTIZED = {"load_in_4bit": 0.5 + 4 / 64, "load_in_8bit": 1.0}
MANY = 8  # GPUs, of which sharding is advised


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
class CostEstimate:
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


def estimate_cost(
    config: Config,
    student: Geometry,
    teacher: Geometry,
    workload: Workload,
    throughput: Throughput,
    gpus: int,
    gpu_bytes: float,
) -> CostEstimate:
    sequences = workload.sequences
    passes = passes_of(config)
    done = flops.update(student, teacher, sequences, with_recomputing(config, passes)).total
    return CostEstimate(
        kind=config.objective.kind,
        paper=flops.paper_update(
            student, teacher, workload.completions, workload.prompt, workload.completion
        ),
        true=flops.update(student, teacher, sequences, passes),
        done=done,
        memory=memory.of_step(student, teacher, setup(config, student, workload, gpus, gpu_bytes)),
        seconds=throughput.seconds(workload.tokens / gpus, done / gpus),
        gpus=gpus,
    )


def passes_of(config: Config) -> flops.Passes:
    lora, reward = config.model.lora is not None, config.reward.create()
    return flops.Passes.of(lora, reward.needs_statistics)


def with_recomputing(config: Config, passes: flops.Passes) -> flops.Passes:
    return passes.recomputing() if config.model.gradient_checkpointing else passes


def setup(
    config: Config, student: Geometry, workload: Workload, gpus: int, gpu_bytes: float
) -> memory.Setup:
    lora, teacher, engine = config.model.lora, config.only_teacher, config.rollout.engine
    sharded, vllm = config.train.sharding == "fsdp2", config.rollout.vllm
    return memory.Setup(
        completions=math.ceil(workload.completions / gpus),
        prompt=workload.prompt,
        completion=workload.longest,
        max_tokens=config.train.max_tokens_per_batch,
        teacher_max_tokens=teacher.max_tokens_per_batch,
        compute=BYTES[config.model.dtype],
        master=BYTES[config.model.master_dtype],
        teacher=BYTES[teacher.dtype],
        rollout_batch=config.rollout.batch_size,
        reads_along=config.needs_local_teacher is not None,
        checkpointing=config.model.gradient_checkpointing,
        lora_rank=lora.r if lora else None,
        lora_parameters=lora_parameters(student, lora) if lora else 0,
        shards=gpus if sharded else 1,
        samples=SAMPLES.get(engine, "transformers"),
        vllm_bytes=int(vllm.gpu_memory_utilization * gpu_bytes),
        teacher_at="servers" if teacher.servers else "host" if teacher.offload else "device",
        teacher_linear=quantized(teacher.quantization or {}),
    )


def quantized(options: Mapping[str, Any]) -> float | None:
    """Bytes of a number of a linear layer; None where it is not known."""
    return next((size for key, size in QUANTIZED.items() if options.get(key)), None)


def lora_parameters(geometry: Geometry, lora: LoraConfig) -> int:
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
    """The fewest GPUs that hold a step, or None: each holds both models, sharding apart, so more
    of them only share the completions."""
    for gpus in range(1, workload.completions + 1):
        each = setup(config, student, workload, gpus, gpu_bytes)
        step = memory.of_step(student, teacher, each)
        if step.peak <= USABLE * gpu_bytes:
            return gpus
    return None


@dataclass(frozen=True)
class Advice:
    """A setting that lowers the peak."""

    override: str
    peak_bytes: int
    gpus: int


def advice(student: Geometry, teacher: Geometry, base: memory.Setup, gpus: int) -> list[Advice]:
    """What lowers the peak on each of so many GPUs, each setting alone, the lowest first."""
    peak = memory.of_step(student, teacher, base).peak
    half = max(base.length, base.max_tokens // 2)
    adapter, shards = lora_parameters(student, LoraConfig()), max(gpus, MANY)
    options = {
        f"train.max_tokens_per_batch={half}": (gpus, replace(base, max_tokens=half)),
        "model.gradient_checkpointing=true": (gpus, replace(base, checkpointing=True)),
        "model.lora={}": (gpus, replace(base, lora_rank=LoraConfig().r, lora_parameters=adapter)),
        "train.sharding=fsdp2": (
            shards,
            replace(base, shards=shards, completions=math.ceil(base.completions * gpus / shards)),
        ),
    }
    if base.teacher_at == "device" and base.teacher_linear is None and not base.reads_along:
        options["teacher.offload=true"] = (gpus, replace(base, teacher_at="host"))
    found = [
        Advice(key, memory.of_step(student, teacher, changed).peak, count)
        for key, (count, changed) in options.items()
    ]
    return sorted((a for a in found if a.peak_bytes < peak), key=lambda a: a.peak_bytes)
