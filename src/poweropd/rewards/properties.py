"""Tests a reward for the two properties of PowerOPD: it is bounded, and it keeps the sign."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


FAR = (1e20, 1e30)  # minus these are log-probabilities beyond any that a model gives


@dataclass(frozen=True)
class Check:
    """What `check` found. A counter-example is (t, p, r), two probabilities and the reward."""

    bounded: bool
    sign_consistent: bool
    bound: float
    bounded_counterexample: tuple[float, float, float] | None = None
    sign_counterexample: tuple[float, float, float] | None = None


def check(reward: Callable[..., Tensor]) -> Check:
    """Tests a reward for P1, |r| <= M on [0, 1]^2, and P2, sign r = sign(t - p).

    It is evaluated on a grid of log-probabilities from 0 to -1e4, and at two far beyond, the
    teacher's also at -inf, which can refute but not prove: the student gave a token that it sampled
    some probability. A reward that still grows between the two is not bounded. A zero counts
    against P2 only where t or p is 1: elsewhere it may be an underflow.
    """
    import torch

    near = torch.cat([torch.zeros(1), torch.logspace(-6, 4, 201)]).double()
    depths = torch.cat([near, torch.tensor(FAR, dtype=torch.float64)])
    impossible = torch.full((1,), -math.inf, dtype=torch.float64)
    grid = torch.meshgrid(torch.cat([-depths, impossible]), -depths, indexing="ij")
    t, p = (x.flatten() for x in grid)
    r = reward(t, p).double()
    unbounded = ~r.isfinite()
    farthest = (t == -FAR[1]) | (p == -FAR[1])
    grows = farthest & (r.abs() > 2 * r[~farthest].abs().max())
    unbounded = unbounded if unbounded.any() else grows
    certain = (t == 0) | (p == 0)
    wrong_sign = (r * (t - p).sign() < 0) | ((t == p) != (r == 0)) & ((t == p) | certain)
    wrong_sign |= r.isnan()

    def example(bad: Tensor) -> tuple[float, float, float] | None:
        i = int(bad.int().argmax())
        return (t[i].exp().item(), p[i].exp().item(), r[i].item()) if bad.any() else None

    bounded = not unbounded.any()
    return Check(
        bounded=bounded,
        sign_consistent=not wrong_sign.any(),
        bound=r.abs().max().item() if bounded else math.inf,
        bounded_counterexample=example(unbounded),
        sign_counterexample=example(wrong_sign),
    )
