"""Where the time of a step goes, and how much memory it took."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("rollout", "score", "update", "sync")


class StepClock:
    """Seconds per phase of one optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start

    def metrics(self, tokens: int) -> dict[str, float]:
        total = time.perf_counter() - self.start
        return {
            **{f"seconds/{name}": seconds for name, seconds in self.seconds.items()},
            "seconds/step": total,
            "tokens_per_second": tokens / total,
            "memory/peak_bytes": peak_bytes(self.device),
        }


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: the device's allocator on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
