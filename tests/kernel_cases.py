"""Random inputs of the kernels and their oracle, for the kernels' tests."""

from typing import Any

import torch
from torch import Tensor

from poweropd import rewards
from poweropd.kernels import Head, linear_policy_gradient, reference

V, H, CHUNK = 61, 8, 6  # V is prime
# These factors, and their quotients, have no rounding in float32: else the one whose rounding of
# them happens to be smaller is nearer to float64, by 4%.
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.75, "temperature": 1.5},
    "capped": {"scale": 1.5, "softcap": 2.0, "temperature": 0.5},
    "bias": {"bias": True, "scale": 0.5, "softcap": 5.0},
}
MERGED = torch.tensor([3, 7, 7, 50])


class Case:
    """Random inputs of a head in one dtype, and the same values in float64 or any other."""

    def __init__(self, n: int, dtype: torch.dtype, head: str = "plain", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        options = dict(HEADS[head])

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.hidden, self.weight = normal(n, H), normal(V, H)
        self.bias = normal(V) if options.pop("bias", False) else None
        self.options = options
        self.targets = torch.randint(V, (n,), generator=generator)
        self.targets[: n // 3] = 7
        self.coefficient = torch.randn(n, generator=generator)
        self.coefficient[n // 4 : n // 2] = 0
        self.teacher_hidden = normal(n, H + 2)
        self.teacher_weight = normal(V, H + 2)

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Head]:
        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype, copy=True).requires_grad_()

        bias = None if self.bias is None else leaf(self.bias)
        return leaf(self.hidden), Head(leaf(self.weight), bias, **self.options)

    def teacher(self, dtype: torch.dtype) -> tuple[Tensor, Head]:
        return self.teacher_hidden.to(dtype), Head(self.teacher_weight.to(dtype), scale=0.8)


def options_of(head: Head) -> dict[str, Any]:
    """Everything but the weight, as keyword arguments of the fronts."""
    return {name: value for name, value in vars(head).items() if name != "weight"}


def gradients(loss: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    inputs = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return [g.double() for g in torch.autograd.grad(loss, inputs)]


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()


def policy_gradient(case: Case, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    hidden, head = case.leaves(dtype)
    loss = linear_policy_gradient(
        hidden,
        head.weight,
        case.targets,
        lambda log_probs, tokens: case.coefficient[tokens],
        **{"chunk_size": CHUNK, **options_of(head), **options},
    )
    assert loss.dtype == torch.float32
    return [loss.detach().double(), *gradients(loss, hidden, head)]


def oracle(case: Case, dtype: torch.dtype, merged_ids: Tensor | None = None) -> list[Tensor]:
    hidden, head = case.leaves(dtype)
    loss = reference.policy_gradient(
        hidden, head, case.targets, lambda _: case.coefficient.to(dtype), merged_ids
    )
    return [loss.detach().double(), *gradients(loss, hidden, head)]


# Those without steps, whose sums show how exact the matmuls are.
SMOOTH = ("log_ratio", "clip", "tanh", "power", "hellinger", "tsallis", "proximal")
REWARDS = {name: rewards.create(name) for name in (*SMOOTH, "jensen_shannon")}
