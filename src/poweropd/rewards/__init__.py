"""Token rewards of on-policy distillation: pure functions of two log-probabilities.

For a sampled token let t be the teacher's probability and p the student's. A reward r(t, p) says
how much more likely the token should become; the student's loss is -sum(r * ln p) / N. Rewards
take ln t and ln p, of any shape and float dtype, and return float32 without a gradient::

    reward = create("power", alpha=5.0)
    r = reward(teacher_log_probs, student_log_probs)

This module needs torch alone, and not before the first call, so that a recipe is checked at once.
The equations are those of PowerOPD (arXiv:2606.17199) where no other source is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from poweropd.errors import check_call, import_object, shown
from poweropd.rewards.base import Number, Reward, log_ratio, numeric_parameter, positive_parameter
from poweropd.rewards.properties import Check, check
from poweropd.rewards.ratios import (
    Clip,
    Hellinger,
    JensenShannon,
    LogRatio,
    Proximal,
    Sign,
    Tanh,
    Tsallis,
)
from poweropd.rewards.schedules import SCHEDULES, Schedule

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["REWARDS", "SCHEDULES", "Check", "Reward", "Schedule", "check", "create", "log_ratio"]

RewardFunction = Callable[..., "Tensor"]


@dataclass(frozen=True)
class Power(Reward):
    """t^alpha - p^alpha: PowerOPD. In [-1, 1], with the sign of ln t - ln p.

    `scale="box_cox"` divides by alpha; its limit for alpha -> 0 is the log ratio.
    """

    alpha: Number = positive_parameter(5.0)
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
class Suppress(Reward):
    """-1 where p < threshold, else 0: a control that ignores the teacher (arXiv:2608.31046)."""

    threshold: Number = numeric_parameter(0.1, "in (0, 1]", lambda x: 0 < x <= 1)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return (p.exp() >= self.threshold).to(p.dtype) - 1


@dataclass(frozen=True)
class Gate(Reward):
    """1 where t > threshold, else 0: a control that ignores the student's probability."""

    threshold: Number = numeric_parameter(0.5, "in [0, 1)", lambda x: 0 <= x < 1)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return (t.exp() > self.threshold).float()


@dataclass(frozen=True)
class Derived(Reward):
    """A reward that is made of another one, its `base`."""

    base: Reward = field(default_factory=LogRatio)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.base, Mapping) and "name" in self.base:  # as a recipe has it
            object.__setattr__(self, "base", create(**self.base))
        if not isinstance(self.base, Reward) or self.base.needs_statistics:
            raise ValueError(f"base: expected a reward other than zscore, got {self.base!r}")

    def at(self, step: int) -> Self:
        """Returns this reward with every schedule resolved, also those of its base."""
        return dataclasses.replace(super().at(step), base=self.base.at(step))

    @property
    def needs_reference(self) -> bool:
        return self.base.needs_reference

    def with_reference(self, reference_log_probs: Tensor) -> Reward:
        return dataclasses.replace(self, base=self.base.with_reference(reference_log_probs))


@dataclass(frozen=True)
class Trust(Derived):
    """A base reward where |ln t - ln p| <= bound, else 0: outliers train nothing.

    N stays the number of all trained tokens. (After TrOPD, arXiv:2606.01249, which draws whether a
    token is trusted, with probability min(t / p, 1).)
    """

    bound: Number = positive_parameter(2.0)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        trusted = log_ratio(t, p).abs() <= self.bound
        return self.base.compute(t, p).where(trusted, 0.0)


@dataclass(frozen=True)
class Extrapolate(Derived):
    """factor r(t, p) + (1 - factor) r(q, p): a base reward r, and q a reference's probability.

    With the log ratio that is factor ln t + (1 - factor) ln q - ln p: G-OPD, or ExOPD above a
    factor of 1 (arXiv:2602.12125). It goes on beyond the teacher in the direction in which the
    teacher differs from the reference. Bounded if the base is, by |factor| + |1 - factor| times as
    much; its sign is not that of t - p.
    """

    factor: Number = positive_parameter(1.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base.needs_reference:
            raise ValueError(f"base: expected a reward without a reference, got {self.base!r}")

    @property
    def needs_reference(self) -> bool:
        return True

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        raise ValueError("extrapolate needs a reference: call with_reference(log_probs)")

    def with_reference(self, reference_log_probs: Tensor) -> Reward:
        return Extrapolated(self.base, self.factor, reference_log_probs)


@dataclass(frozen=True)
class Extrapolated(Reward):
    """What `Extrapolate` becomes for tokens whose log-probs under the reference are known."""

    base: Reward
    factor: float
    reference_log_probs: Tensor

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        own = self.base.compute(t, p)
        if self.factor == 1:  # an infinite reward of the reference must not count, not even as 0
            return own
        reference = self.reference_log_probs.to(p.dtype).expand_as(p)
        return self.factor * own + (1 - self.factor) * self.base.compute(reference, p)

    def divergence(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Returns factor D(t, p) + (1 - factor) D(q, p), with the base's divergence D."""
        own = self.base.divergence(teacher_log_probs, student_log_probs)
        to_reference = self.base.divergence(self.reference_log_probs, student_log_probs)
        return self.factor * own + (1 - self.factor) * to_reference


@dataclass(frozen=True)
class ZScore(Derived):
    """(r - mean) / std of a base reward over the step's trained tokens, on all processes.

    `with_statistics` gives the mean and the population std. Signs may flip.
    """

    needs_statistics: ClassVar[bool] = True

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        raise ValueError("zscore needs the step's statistics: call with_statistics(mean, std)")

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

    @property
    def needs_reference(self) -> bool:
        return self.base.needs_reference

    def with_reference(self, reference_log_probs: Tensor) -> Reward:
        return dataclasses.replace(self, base=self.base.with_reference(reference_log_probs))

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
    "trust": Trust,
    "extrapolate": Extrapolate,
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
