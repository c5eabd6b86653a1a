"""What every token reward is: a pure function of two log-probabilities, with checked parameters."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from poweropd.errors import shown
from poweropd.rewards.schedules import Schedule

if TYPE_CHECKING:
    from torch import Tensor

Number = Any  # a float, or a Schedule of floats until `Reward.at` resolves it


def numeric_parameter(default: float, expected: str, holds: Callable[[float], bool]) -> Any:
    """Declares a numeric parameter, possibly scheduled, whose values all are as expected."""
    return field(default=default, metadata={"expected": f"a number {expected}", "holds": holds})


def positive_parameter(default: float) -> Any:
    """Declares a numeric parameter above 0."""
    return numeric_parameter(default, "> 0", lambda x: x > 0)


@dataclass(frozen=True)
class Reward(ABC):
    """A token reward. Subclasses state `compute`; calling checks, casts and detaches."""

    # Whether it needs the mean and standard deviation of the whole optimizer step.
    needs_statistics: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        """Returns whether it needs a reference model's log-probs, too: see `with_reference`."""
        return False

    def __post_init__(self) -> None:
        for parameter in dataclasses.fields(self):
            value, rule = self.__dict__[parameter.name], parameter.metadata
            for x in value.ends() if isinstance(value, Schedule) else (value,):
                is_number = isinstance(x, int | float) and not isinstance(x, bool)
                if "holds" in rule and not (is_number and math.isfinite(x) and rule["holds"](x)):
                    raise ValueError(
                        f"{parameter.name}: expected {rule['expected']}, got {shown(x)}"
                    )

    @abstractmethod
    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        """Returns the reward of log-probs `t` (teacher) and `p` (student), of their shape."""

    def __call__(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Returns the reward per token: float32, no gradient, the inputs' (broadcast) shape.

        float64 inputs are computed in float64, all others in float32: a bf16 probability is
        never raised to a power. A bounded reward is finite even if the teacher's log-prob is -inf.
        """
        import torch

        for name, value in self.__dict__.items():
            if isinstance(value, Schedule):
                raise ValueError(f"{name} follows a schedule: call reward.at(step) first")
        with torch.no_grad():
            teacher, student = torch.broadcast_tensors(teacher_log_probs, student_log_probs)
            dtype = torch.promote_types(torch.result_type(teacher, student), torch.float32)
            return self.compute(teacher.detach().to(dtype), student.detach().to(dtype)).float()

    def at(self, step: int) -> Self:
        """Returns this reward with every schedule resolved at optimizer step `step` (from 0)."""
        resolved = {k: v.at(step) for k, v in self.__dict__.items() if isinstance(v, Schedule)}
        return dataclasses.replace(self, **resolved) if resolved else self

    @property
    def unstandardized(self) -> Reward:
        """Returns the reward whose statistics `with_statistics` expects: of a z-score, its base."""
        return self

    def with_statistics(self, mean: float, std: float) -> Reward:
        """Returns this reward given the step's mean and population standard deviation."""
        return self

    def with_reference(self, reference_log_probs: Tensor) -> Reward:
        """Returns this reward given a reference model's log-probs of the tokens it is called with.

        Their shape is that of the other log-probs, or is broadcast to it.
        """
        return self

    def divergence(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Returns what full-vocabulary training with this reward descends on, per position.

        Log-distributions [..., V] become [...]. The default, -sum_v p r(t, p), is the reverse
        KL for the log ratio; for other rewards it is the expected penalty under the student.
        """
        probs, reward = student_log_probs.exp(), self(teacher_log_probs, student_log_probs)
        return -(probs * reward).where(probs > 0, 0.0).sum(-1)


def log_ratio(t: Tensor, p: Tensor) -> Tensor:
    """Returns ln t - ln p from log-probabilities, 0 if they are equal.

    Two log-probabilities of -inf are equal, too; their difference would be NaN.
    """
    return (t - p).masked_fill(t == p, 0.0)
