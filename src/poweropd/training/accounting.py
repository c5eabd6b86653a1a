"""Where the time of a step goes, how much memory it took, and what share of the device it used."""

import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from poweropd.data.rollout import Example
from poweropd.errors import UsageError
from poweropd.models import flops
from poweropd.models.devices import peak_flops
from poweropd.models.geometry import Geometry
from poweropd.models.language_model import LanguageModel

PHASES = ("rollout", "score", "update", "sync")


class StepClock:
    """Seconds per phase of one optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to a phase."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start

    def metrics(self, tokens: int) -> dict[str, float]:
        """Returns the metrics of a step that sampled so many tokens."""
        total = time.perf_counter() - self.start
        return {
            **{f"seconds/{name}": seconds for name, seconds in self.seconds.items()},
            "seconds/step": total,
            "tokens_per_second": tokens / total,
            "memory/peak_bytes": peak_bytes(self.device),
        }


def peak_bytes(device: torch.device) -> int:
    """Returns the peak so far of the GPU's allocator, or of the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Utilization:
    """Model FLOPs utilisation of a process: scoring and update, against its device's peak.

    Sampling is left out, for memory bounds it, and so is what checkpointing computes again.
    """

    student: Geometry
    teacher: Geometry | None  # None where another machine computes it
    passes: flops.Passes
    peak: float  # FLOP/s
    reference: Geometry | None = None  # of the reward's reference model

    @classmethod
    def of(
        cls,
        student: LanguageModel,
        teacher: LanguageModel | None,
        needs_statistics: bool,
        reference: LanguageModel | None = None,
        peak: float | None = None,
    ) -> "Utilization | None":
        """Returns the accounting of loaded models; None if the peak or a geometry is not known.

        `peak` is in FLOP/s; without it, the device's own is taken if it is in `GPUS`.
        """
        peak = peak or peak_flops(student.device, student.compute_dtype)
        if peak is None:
            return None
        try:
            own = geometry_of(student)
            other, third = (None if m is None else geometry_of(m) for m in (teacher, reference))
        except UsageError:
            return None
        passes = flops.Passes.of(student.lora, needs_statistics)
        return cls(own, other, passes, peak, third)

    def metrics(self, examples: Iterable[Example], clock: StepClock) -> dict[str, float]:
        """Returns `mfu` of this process's examples of a step; {} if it had none."""
        sequences = [(e.student_length, e.num_tokens) for e in examples]
        busy = clock.seconds["score"] + clock.seconds["update"]
        models = (self.student, self.teacher)
        done = flops.update(*models, sequences, self.passes, self.reference).total
        return {"mfu": done / busy / self.peak} if sequences else {}


def geometry_of(model: LanguageModel) -> Geometry:
    """Returns the geometry of a loaded model; raises UsageError if it cannot be modelled."""
    config = model.causal_lm.config
    return Geometry.from_fields(config.name_or_path, config.get_text_config().to_dict())
