"""Parameters of rewards that move with the optimizer step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

#: Schedule -> the fraction of the way from start to end, as a function of that of its steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


@dataclass(frozen=True)
class Schedule:
    """A parameter that moves from `start` to `end` over the first `steps` optimizer steps."""

    schedule: str  # a name of SCHEDULES
    start: float
    end: float | None = None  # None: stays at `start`
    steps: int = 1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise ValueError(f"schedule: expected one of {known}, got {self.schedule!r}")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps of a schedule: expected an integer >= 1, got {self.steps!r}")
        if self.schedule != "constant" and self.end is None:
            raise ValueError(f"a {self.schedule} schedule needs `end`")

    def ends(self) -> tuple[float, ...]:
        """Returns the values between which it moves."""
        return (self.start,) if self.end is None else (self.start, self.end)

    def at(self, step: int) -> float:
        """Returns the value at optimizer step `step`, counted from 0."""
        end = self.start if self.end is None else self.end
        done = SCHEDULES[self.schedule](min(max(step / self.steps, 0.0), 1.0))
        return self.start + (end - self.start) * done
