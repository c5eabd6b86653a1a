"""Rewards that are functions of the log ratio ln t - ln p alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from poweropd.rewards.base import Number, Reward, log_ratio, numeric_parameter, positive_parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LogRatio(Reward):
    """ln t - ln p: vanilla on-policy distillation. Unbounded."""

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return log_ratio(t, p)


@dataclass(frozen=True)
class Clip(Reward):
    """clamp(ln t - ln p, low, high)."""

    low: Number = numeric_parameter(-1.0, "< 0", lambda x: x < 0)
    high: Number = positive_parameter(1.0)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return log_ratio(t, p).clamp(self.low, self.high)


@dataclass(frozen=True)
class Tanh(Reward):
    """tanh((ln t - ln p) / temperature)."""

    temperature: Number = positive_parameter(5.0)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return (log_ratio(t, p) / self.temperature).tanh()


@dataclass(frozen=True)
class Hellinger(Reward):
    """2 (sqrt(t / p) - 1) = 2 expm1(d / 2), at most `cap`; without the cap, unbounded above.

    Without the cap, its expectation under p descends on the squared Hellinger distance.
    """

    cap: Number = positive_parameter(10.0)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return (2 * (log_ratio(t, p) / 2).expm1()).clamp(max=self.cap)


@dataclass(frozen=True)
class Tsallis(Reward):
    """(1 - (p / t)^(q - 1)) / (q - 1) within [-cap, cap]: the log ratio with Tsallis' logarithm.

    For q -> 1 it is the log ratio, and for q = 1/2 `Hellinger`. Without the cap it is bounded above
    for q > 1, below for q < 1, and its expectation under p descends on `divergence`.
    """

    q: Number = positive_parameter(0.5)
    cap: Number = positive_parameter(10.0)

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

    share: Number = numeric_parameter(0.5, "in (0, 1]", lambda x: 0 < x <= 1)

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
        t, d = teacher_log_probs.exp(), log_ratio(teacher_log_probs, student_log_probs)
        to_mixture = -_log_mixture_ratio(-d, 1 - a)  # ln t - ln m, also where p is 0
        return own + a / (1 - a) * (t * to_mixture).where(t > 0, 0.0).sum(-1)


@dataclass(frozen=True)
class JensenShannon(Reward):
    """(1 - b) ln(m / p) with m = b t + (1 - b) p and b = beta.

    Its expectation under p descends on the generalized Jensen-Shannon divergence of GKD
    (arXiv:2306.13649), b KL(t || m) + (1 - b) KL(p || m). At least (1 - b) ln(1 - b).
    """

    beta: Number = numeric_parameter(0.5, "in (0, 1)", lambda x: 0 < x < 1)

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return (1 - self.beta) * _log_mixture_ratio(log_ratio(t, p), self.beta)

    def divergence(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Returns b KL(t || m) + (1 - b) KL(p || m), per position."""
        proximal = Proximal(self.beta).divergence(teacher_log_probs, student_log_probs)
        return (1 - self.beta) * proximal


def _log_mixture_ratio(d: Tensor, share: float) -> Tensor:
    """Returns ln(a exp(d) + 1 - a), exact to rounding for every d and every a in (0, 1]."""
    import torch

    near = (share * d.clamp(-1, 1).expm1()).log1p()  # logaddexp would lose the digits of a small d
    rest = d.new_tensor(1 - share).log()
    return torch.where(d.abs() < 1, near, torch.logaddexp(d + math.log(share), rest))


@dataclass(frozen=True)
class Sign(Reward):
    """The sign of t - p: all tokens that the teacher likes more count alike."""

    def compute(self, t: Tensor, p: Tensor) -> Tensor:
        return log_ratio(t, p).sign()

    def divergence(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Returns sum_v |t - p|, twice the total variation; minus its derivative in p_v is r."""
        return (teacher_log_probs.exp() - student_log_probs.exp()).abs().sum(-1)
