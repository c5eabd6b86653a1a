"""Estimates FLOPs, memory, time and cost of a run from geometries and a recipe."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

from poweropd.config import Config
from poweropd.config.sections import LoraConfig
from poweropd.errors import UsageError
from poweropd.models import flops
from poweropd.models.geometry import Geometry
from poweropd.plan.memory import Memory, Setup, TeacherPlaceInMemory, of_step
from poweropd.plan.throughput import Throughput

# Bytes of a number; auto is bfloat16 on the GPUs that are planned for.
BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
# Share of a device's memory; the rest is the CUDA context and what the allocator cannot use.
USABLE = 0.9
KINDS = ("sampled", "full_vocab")
SAMPLES: dict[str, Literal["transformers", "vllm", "server"]] = {
    "vllm": "vllm",
    "vllm_server": "server",
}
# Bytes of a number in bitsandbytes: four bits and a float32 scale for 64 of them; eight bits, whose
# scales, one for each output, are not counted.
QUANTIZED = {"load_in_4bit": 0.5 + 4 / 64, "load_in_8bit": 1.0}
MANY = 8  # GPUs for which sharding is advised


@dataclass(frozen=True)
class Workload:
    """The completions of a step and their lengths in tokens."""

    completions: int
    prompt: int
    completion: int  # mean length, by which FLOPs and time are counted
    longest: int  # length that memory must hold

    @classmethod
    def of(cls, config: Config, prompt: float, completion: float | None) -> "Workload":
        """Returns the workload of a recipe; completions of unknown length are as long as may be.

        That is the mean over the steps if a schedule moves it.
        """
        rollout, steps = config.rollout, range(config.train.steps)
        longest = rollout.longest
        completion = completion or fmean(map(rollout.max_new_tokens_at, steps))
        return cls(
            completions=config.train.prompts_per_step * config.rollout.per_prompt,
            prompt=round(prompt),
            completion=round(min(completion, longest)),
            longest=longest,
        )

    @property
    def tokens(self) -> int:
        return self.completions * self.completion

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """Returns (tokens read, tokens trained) of each; the last is read, too, as in the paper."""
        return [(self.prompt + self.completion, self.completion)] * self.completions


@dataclass(frozen=True)
class CostEstimate:
    """The cost of one objective on each of several GPUs."""

    kind: str
    paper: flops.UpdateFlops
    true: flops.UpdateFlops  # as a utilization is measured: without what checkpointing recomputes
    memory: Memory
    seconds: dict[str, float | None]  # phase -> seconds of a step; None if not known
    gpus: int

    @property
    def paper_flops(self) -> float:
        """Returns FLOPs as the paper counts them: the sampled update without heads, else all."""
        return self.paper.total if self.kind == "full_vocab" else self.paper.bodies

    @property
    def step_seconds(self) -> float | None:
        """Returns the seconds of a step, or None if a phase is not known."""
        known = [s for s in self.seconds.values() if s is not None]
        return sum(known) if len(known) == len(self.seconds) else None

    def gpu_hours(self, steps: int) -> float | None:
        """Returns the GPU-hours of a run of so many steps, or None if a phase is not known."""
        seconds = self.step_seconds
        return None if seconds is None else seconds * steps * self.gpus / 3600

    def to_dict(self, steps: int) -> dict[str, object]:
        """Returns plain values for JSON: FLOPs, bytes, seconds."""
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


@dataclass(frozen=True)
class Advice:
    """A setting that lowers the peak."""

    override: str
    peak_bytes: int
    gpus: int


@dataclass(frozen=True)
class Scenario:
    """A recipe with all that its cost depends on, but for the number of GPUs and their speed."""

    config: Config
    student: Geometry
    teacher: Geometry
    workload: Workload
    gpu_bytes: float
    reference: Geometry | None = None  # of the reward's reference model

    @classmethod
    def of(
        cls, config: Config, models: Mapping[str, Geometry], workload: Workload, gpu_bytes: float
    ) -> "Scenario":
        """Returns the scenario of a recipe whose models have these geometries by their role."""
        student, teacher, reference = models["student"], models["teacher"], models.get("reference")
        return cls(config, student, teacher, workload, gpu_bytes, reference)

    def with_kind(self, kind: str) -> "Scenario":
        """Returns the scenario with another objective.kind. Raises UsageError if it cannot be."""
        if kind not in KINDS:
            raise UsageError(f"--compare: expected some of {','.join(KINDS)}, got {kind!r}")
        objective = self.config.objective.model_copy(update={"kind": kind})
        fields = self.config.model_copy(update={"objective": objective}).model_dump()
        return replace(self, config=Config.from_dict(fields))

    def update_flops(self, recomputed: bool) -> flops.UpdateFlops:
        """Returns the FLOPs of scoring and update, with or without recomputed activations."""
        lora, reward = self.config.model.lora is not None, self.config.reward.create()
        passes = flops.Passes.of(lora, reward.needs_statistics)
        if recomputed and self.config.model.gradient_checkpointing:
            passes = passes.recomputing()
        sequences = self.workload.sequences
        return flops.update(self.student, self.teacher, sequences, passes, self.reference)

    def cost(self, throughput: Throughput, gpus: int) -> CostEstimate:
        """Estimates what a step costs on each of so many GPUs."""
        work = self.workload
        done = self.update_flops(recomputed=True).total
        return CostEstimate(
            kind=self.config.objective.kind,
            paper=flops.paper_update(
                self.student, self.teacher, work.completions, work.prompt, work.completion
            ),
            true=self.update_flops(recomputed=False),
            memory=self.memory_of(self.setup(gpus)),
            seconds=throughput.seconds(work.tokens / gpus, done / gpus),
            gpus=gpus,
        )

    def memory_of(self, setup: Setup) -> Memory:
        return of_step(self.student, self.teacher, setup, self.reference)

    def setup(self, gpus: int) -> Setup:
        """Returns what the memory of each of so many GPUs depends on."""
        config, lora, teacher = self.config, self.config.model.lora, self.config.only_teacher
        vllm = config.rollout.vllm
        return Setup(
            completions=math.ceil(self.workload.completions / gpus),
            prompt=self.workload.prompt,
            completion=self.workload.longest,
            max_tokens=config.train.max_tokens_per_batch,
            teacher_max_tokens=teacher.max_tokens_per_batch,
            compute=BYTES[config.model.dtype],
            master=BYTES[config.model.master_dtype],
            teacher=BYTES[teacher.dtype],
            rollout_batch=config.rollout.batch_size,
            reads_along=config.needs_local_teacher is not None,
            checkpointing=config.model.gradient_checkpointing,
            lora_rank=lora.r if lora else None,
            lora_parameters=lora_parameters(self.student, lora) if lora else 0,
            shards=gpus if config.train.sharding == "fsdp2" else 1,
            samples=SAMPLES.get(config.rollout.engine, "transformers"),
            vllm_bytes=int(vllm.gpu_memory_utilization * self.gpu_bytes),
            teacher_at=self._teacher_at(),
            averaged=config.self_teacher is not None and config.self_teacher.self == "ema",
            teacher_linear=quantized(teacher.quantization or {}),
            **self.reference_setup(),
        )

    def _teacher_at(self) -> TeacherPlaceInMemory:
        """Returns where the teacher's weights are."""
        if self.config.teacher_in_student is not None:
            return "student"
        teacher = self.config.only_teacher
        return "servers" if teacher.servers else "host" if teacher.offload else "device"

    def reference_setup(self) -> dict[str, Any]:
        """Returns what the memory of the reward's reference depends on; {} without one."""
        section = self.config.reference_model
        if section is None:
            return {}
        shared = self.config.reference_in_student
        return {
            "reference": BYTES[section.dtype],
            "reference_max_tokens": section.max_tokens_per_batch,
            "reference_at": "student" if shared else "host" if section.offload else "device",
        }

    def gpus_needed(self) -> int | None:
        """Returns the fewest GPUs that hold a step, or None if no number of them does.

        Without sharding each GPU holds both models, so more of them only share the completions.
        """
        for gpus in range(1, self.workload.completions + 1):
            if self.memory_of(self.setup(gpus)).peak <= USABLE * self.gpu_bytes:
                return gpus
        return None

    def advice(self, gpus: int) -> list[Advice]:
        """Returns settings that, each alone, lower the peak on each GPU; the lowest comes first."""
        base = self.setup(gpus)
        half = max(base.length, base.max_tokens // 2)
        lora, shards = LoraConfig(), max(gpus, MANY)
        adapter = lora_parameters(self.student, lora)
        shared = math.ceil(base.completions * gpus / shards)
        options = {
            f"train.max_tokens_per_batch={half}": (gpus, replace(base, max_tokens=half)),
            "model.gradient_checkpointing=true": (gpus, replace(base, checkpointing=True)),
            "model.lora={}": (gpus, replace(base, lora_rank=lora.r, lora_parameters=adapter)),
            "train.sharding=fsdp2": (shards, replace(base, shards=shards, completions=shared)),
        }
        if base.teacher_at == "device" and base.teacher_linear is None and not base.reads_along:
            options["teacher.offload=true"] = (gpus, replace(base, teacher_at="host"))
        peak = self.memory_of(base).peak
        found = [Advice(key, self.memory_of(each).peak, n) for key, (n, each) in options.items()]
        return sorted((a for a in found if a.peak_bytes < peak), key=lambda a: a.peak_bytes)


def quantized(options: Mapping[str, object]) -> float | None:
    """Returns the bytes of a number of a linear layer, or None if they are not known."""
    return next((size for key, size in QUANTIZED.items() if options.get(key)), None)


def lora_parameters(geometry: Geometry, lora: LoraConfig) -> int:
    targets = geometry.linears if lora.target_modules == "all-linear" else lora.target_modules
    widths = [sum(shape) for name, shape in geometry.linears.items() if name in targets]
    return geometry.layers * lora.r * sum(widths)
