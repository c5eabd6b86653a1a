"""Token rewards of on-policy distillation: pure functions of two log-probabilities.

For a sampled token let t be the teacher's probability and p the student's. A reward r(t, p) says
how much more likely the token should become; the student's loss is -sum(r * ln p) / N. Rewards
take ln t and ln p, of any shape and float dtype, and return float32 without a gradient::

    reward = create("power", alpha=5.0)
    r = reward(teacher_log_probs, student_log_probs)

This module needs torch alone, and not before the first call, so that a recipe is checked at once.
The equations are those of PowerOPD (arXiv:2606.17199).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from poweropd.errors import check_call, import_object, shown
from poweropd.rewards.properties import Check, check
from poweropd.rewards.schedules import SCHEDULES, Schedule

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["REWARDS", "SCHEDULES", "Check", "Reward", "Schedule", "check", "create", "log_ratio"]

RewardFunction = Callable[..., "Tensor"]
Number = Any  # a float, or a Schedule of floats until `Reward.at` resolves it


def _number(default: float, expected: str, holds: Callable[[float], bool]) -> Any:
    """Declares a numeric parameter, possibly scheduled, whose values all are as expected."""
    return field(default=default, metadata={"expected": f"a number {expected}", "holds": holds})


def _positive(default: float) -> Any:
    return _number(default, "> 0", lambda x: x > 0)


@dataclass(frozen=True)
class Reward(ABC):
    """A token reward. Subclasses state `compute`; calling checks, casts and detaches."""

    # Whether it needs the mean and standard deviation of the whole optimizer step.
    needs_statistics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for parameter in dataclasses.fields(self):
            value, rule = self.__dict__[parameter.name], parameter.metadata
            for x in value.ends() if isinstance(value, Schedule) else (value,):
                number = isinstance(x, int | float) and not isinstance(x, bool)
                if "holds" in rule and not (number and math.isfinite(x) and rule["holds"](x)):
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


@dataclass(frozen=True)
class LogRatio(Reward):
    """ln t - ln p: vanilla on-policy distillation. Unbounded."""

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return log_ratio(t, p)


@dataclass(frozen=True)
class Clip(Reward):
    """clamp(ln t - ln p, low, high)."""

    low: Number = _number(-1.0, "< 0", lambda x: x < 0)
    high: Number = _positive(1.0)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return log_ratio(t, p).clamp(self.low, self.high)


@dataclass(frozen=True)
class Tanh(Reward):
    """tanh((ln t - ln p) / temperature)."""

    temperature: Number = _positive(5.0)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return (log_ratio(t, p) / self.temperature).tanh()


@dataclass(frozen=True)
class Power(Reward):
    """t^alpha - p^alpha: PowerOPD. In [-1, 1], with the sign of ln t - ln p.

    `scale="box_cox"` divides by alpha; its limit for alpha -> 0 is the log ratio.
    """

    alpha: Number = _positive(5.0)
    scale: Literal["unit", "box_cox"] = "unit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("unit", "box_cox"):
            raise ValueError(f"scale: expected unit or box_cox, got {self.scale!r}")

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        # With d = ln t - ln p:  sign(d) * max(t, p)^alpha * (1 - exp(-alpha |d|)),
        # which neither cancels where t is close to p nor overflows anywhere.
        d = log_ratio(t, p)
        largest = (self.alpha * t.maximum(p)).exp()
        reward = d.sign() * largest * -(-self.alpha * d.abs()).expm1()
        return reward / self.alpha if self.scale == "box_cox" else reward

    def divergence(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Returns the density-power divergence sum_v [p^(a+1)/(a+1) - p t^a + a t^(a+1)/(a+1)].

        Minus its gradient in ln p is sum_v sg[p (t^a - p^a)] grad ln p, so PowerOPD is the
        one-sample estimate of its descent (divergence: Basu et al. 1998, with a = alpha).
        """
        a, t, p = self.alpha, teacher_log_probs, student_log_probs
        own, others = ((a + 1) * p).exp() / (a + 1), a * ((a + 1) * t).exp() / (a + 1)
        value = (own - (p + a * t).exp() + others).sum(-1)
        return value / a if self.scale == "box_cox" else value


@dataclass(frozen=True)
class Hellinger(Reward):
    """2 (sqrt(t / p) - 1) = 2 expm1(d / 2), at most `cap`; without the cap, unbounded above.

    Without the cap, its expectation under p descends on the squared Hellinger distance.
    """

    cap: Number = _positive(10.0)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return (2 * (log_ratio(t, p) / 2).expm1()).clamp(max=self.cap)


@dataclass(frozen=True)
class Tsallis(Reward):
    """(1 - (p / t)^(q - 1)) / (q - 1) within [-cap, cap]: the log ratio with Tsallis' logarithm.

    For q -> 1 it is the log ratio, and for q = 1/2 `Hellinger`. Without the cap it is bounded above
    for q > 1, below for q < 1, and its expectation under p descends on `divergence`.
    """

    q: Number = _positive(0.5)
    cap: Number = _positive(10.0)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        d, order = log_ratio(t, p), self.q - 1
        # expm1 would lose all digits of an order that is almost 0.
        reward = -(-order * d).expm1() / order if abs(order) > 1e-6 else d
        return reward.clamp(-self.cap, self.cap)

    def divergence(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Returns Tsallis' relative entropy sum_v p [(p / t)^(q - 1) - 1] / (q - 1), over q.

        (Tsallis 1998.) Where the cap cuts a reward, it counts with the capped one.
        """
        return super().divergence(teacher_log_probs, student_log_probs) / self.q


@dataclass(frozen=True)
class Proximal(Reward):
    """ln(a t/p + 1 - a) with a = share: the log ratio to a proximal teacher a t + (1 - a) p.

    At least ln(1 - a), and unbounded above (TOP-D, arXiv:2607.04751). a = 1 is the log ratio.
    """

    share: Number = _number(0.5, "in (0, 1]", lambda x: 0 < x <= 1)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return _log_mixture_ratio(log_ratio(t, p), self.share)

    def divergence(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Returns KL(p || m) + a / (1 - a) KL(t || m) with m = a t + (1 - a) p, per position.

        The derivatives of m cancel between its two terms, which leaves -r at each p_v.
        """
        a = self.share
        own = super().divergence(teacher_log_probs, student_log_probs)
        if a == 1:
            return own
        to_mixture = log_ratio(teacher_log_probs, student_log_probs)
        to_mixture = to_mixture - _log_mixture_ratio(to_mixture, a)  # ln t - ln m
        t = teacher_log_probs.exp()
        return own + a / (1 - a) * (t * to_mixture).where(t > 0, 0.0).sum(-1)


@dataclass(frozen=True)
class JensenShannon(Reward):
    """(1 - b) ln(m / p) with m = b t + (1 - b) p and b = beta.

    Its expectation under p descends on the generalized Jensen-Shannon divergence of GKD
    (arXiv:2306.13649), b KL(t || m) + (1 - b) KL(p || m). At least (1 - b) ln(1 - b).
    """

    beta: Number = _number(0.5, "in (0, 1)", lambda x: 0 < x < 1)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return (1 - self.beta) * _log_mixture_ratio(log_ratio(t, p), self.beta)

    def divergence(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Returns b KL(t || m) + (1 - b) KL(p || m), per position."""
        proximal = Proximal(self.beta).divergence(teacher_log_probs, student_log_probs)
        return (1 - self.beta) * proximal


def _log_mixture_ratio(d: Tensor, share: float) -> Tensor:
    """Returns ln(a exp(d) + 1 - a), without overflow, and accurate where d is near 0."""
    weight = (d > 0).to(d.dtype) * (1 - 2 * share) + share  # 1 - a above 0, else a
    return d.clamp(min=0.0) + (weight * (-d.abs()).expm1()).log1p()


@dataclass(frozen=True)
class Sign(Reward):
    """The sign of t - p: all tokens that the teacher likes more count alike."""

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return log_ratio(t, p).sign()

    def divergence(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Returns sum_v |t - p|, twice the total variation; minus its derivative in p_v is r."""
        return (teacher_log_probs.exp() - student_log_probs.exp()).abs().sum(-1)


@dataclass(frozen=True)
class Suppress(Reward):
    """-1 where p < threshold, else 0: a control that ignores the teacher (arXiv:2608.31046)."""

    threshold: Number = _number(0.1, "in (0, 1]", lambda x: 0 < x <= 1)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return -(p.exp() < self.threshold).to(p.dtype)


@dataclass(frozen=True)
class Gate(Reward):
    """1 where t > threshold, else 0: a control that ignores the student's probability."""

    threshold: Number = _number(0.5, "in [0, 1)", lambda x: 0 <= x < 1)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return (t.exp() > self.threshold).float()


@dataclass(frozen=True)
class ZScore(Reward):
    """(r - mean) / std of a base reward over the step's trained tokens, on all processes.

    `with_statistics` gives the mean and the population std. Signs may flip.
    """

    needs_statistics: ClassVar[bool] = True
    base: Reward = field(default_factory=LogRatio)

    def __post_init__(self) -> None:
        if isinstance(self.base, Mapping) and "name" in self.base:  # as a recipe has it
            object.__setattr__(self, "base", create(**self.base))
        if not isinstance(self.base, Reward) or self.base.needs_statistics:
            raise ValueError(f"base: expected a reward other than zscore, got {self.base!r}")

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        raise ValueError("zscore needs the step's statistics: call with_statistics(mean, std)")

    def at(self, step: int) -> Self:
        return dataclasses.replace(self, base=self.base.at(step))

    @property
    def unstandardized(self) -> Reward:
        return self.base

    def with_statistics(self, mean: float, std: float) -> Reward:
        return Standardized(self.base, mean, std)


@dataclass(frozen=True)
class Standardized(Reward):
    """(r - mean) / std of `base`, with known statistics: what `ZScore` becomes in a step."""

    base: Reward
    mean: float
    std: float

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        centered = self.base.compute(t, p) - self.mean
        return centered / self.std if self.std > 0 else centered.new_zeros(centered.shape)


@dataclass(frozen=True)
class Custom(Reward):
    """A user's own function (teacher_log_probs, student_log_probs, **parameters) -> rewards."""

    name: str
    function: RewardFunction
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def at(self, step: int) -> Self:
        """Returns this reward with the schedules of its parameters resolved."""
        items = self.parameters.items()
        resolved = {k: v.at(step) if isinstance(v, Schedule) else v for k, v in items}
        return dataclasses.replace(self, parameters=resolved)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        from torch import Tensor

        reward = self.function(t, p, **self.parameters)
        if not isinstance(reward, Tensor) or reward.shape != t.shape:
            got = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise ValueError(f"reward {self.name}: expected a tensor of {(*t.shape,)}, got {got}")
        return reward


REWARDS: dict[str, type[Reward]] = {
    "log_ratio": LogRatio,
    "clip": Clip,
    "tanh": Tanh,
    "zscore": ZScore,
    "power": Power,
    "hellinger": Hellinger,
    "tsallis": Tsallis,
    "proximal": Proximal,
    "jensen_shannon": JensenShannon,
    "sign": Sign,
    "gate": Gate,
    "suppress": Suppress,
}


def create(name: str, **parameters: Any) -> Reward:
    """Returns the reward `name` of `REWARDS`, or a user's own by "package.module:function".

    Numeric parameters may be a `Schedule` or a mapping of its fields, such as
    {"schedule": "linear", "start": 1.0, "end": 5.0, "steps": 1000}.
    Raises ValueError, naming the parameter, what was expected and what was got.
    """
    if not isinstance(name, str):
        raise ValueError(f"name: expected the name of a reward, got {shown(name)}")
    given = {k: _schedule_or_value(k, v) for k, v in parameters.items()}
    if ":" in name:
        return _custom(name, given)
    if name not in REWARDS:
        raise ValueError(
            f"name: expected one of {', '.join(REWARDS)} or package.module:function, got {name!r}"
        )
    known = [f.name for f in dataclasses.fields(REWARDS[name])]
    for key in given:
        if key not in known:
            listed = ", ".join(known) or "it has none"
            raise ValueError(f"{key}: unknown parameter of reward {name} (known: {listed})")
    return REWARDS[name](**given)


def names_code(tree: object) -> bool:
    """Returns whether a reward, as a recipe has it, names code of the user's own at any depth."""
    if not isinstance(tree, Mapping):
        return False
    own = ":" in str(tree.get("name", ""))
    return own or any(names_code(value) for value in tree.values())


def _schedule_or_value(key: str, value: Any) -> Any:
    if not isinstance(value, Mapping) or "schedule" not in value:
        return value
    try:
        return Schedule(**value)
    except TypeError:
        keys, got = "schedule, start, end, steps", ", ".join(value)
        raise ValueError(f"{key}: a schedule has the keys {keys}, got {got}") from None
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _custom(name: str, parameters: Mapping[str, Any]) -> Reward:
    target = import_object("name", name)
    if isinstance(target, type) and issubclass(target, Reward):
        try:
            return target(**parameters)
        except TypeError as error:
            raise ValueError(f"name: {name}: {error}") from None
    if not callable(target):
        raise ValueError(f"name: expected {name} to be a function or a Reward, got {target!r}")
    check_call("name", name, target, "teacher_log_probs, student_log_probs", parameters)
    return Custom(name, target, parameters)
