"""What the kernels spend: head matmuls, and the size of the tensors they make."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from poweropd import rewards
from poweropd.kernels import (
    Head,
    PairStatistics,
    TeacherHead,
    full_vocab_loss,
    linear_full_vocab,
    linear_log_prob,
    linear_policy_gradient,
    sampled_loss,
    score_tokens,
)

V, H, N, CHUNK = 127, 8, 64, 16
MATMULS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm}


class Watch(TorchDispatchMode):
    """Rows of head matmuls over the vocabulary, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul_rows: list[int] = []
        self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in MATMULS:
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            sizes = [a.shape[0], a.shape[1], b.shape[1]]
            if V in sizes:
                self.matmul_rows.append(math.prod(sizes) // (V * H))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        return result


def watch(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Watch:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    targets = torch.randint(V, (N,))
    with Watch() as seen:
        result = run(hidden, weight, targets)
        if result.requires_grad:
            result.backward()
    assert seen.largest <= max(CHUNK * V, N * H, V * H)
    return seen


def passes(seen: Watch) -> float:
    """Head matmuls over all N tokens."""
    return sum(seen.matmul_rows) / N


def test_log_prob_takes_one_head_matmul() -> None:
    seen = watch(lambda h, w, t: linear_log_prob(h, w, t, chunk_size=CHUNK))
    assert passes(seen) == 1
    seen = watch(lambda h, w, t: score_tokens(h, Head(w), t, chunk_size=CHUNK).entropy)
    assert passes(seen) == 1


def ones(chunk: PairStatistics, tokens: slice) -> Tensor:
    return torch.ones_like(chunk.log_probs)


@pytest.mark.parametrize("merged_ids", [None, torch.tensor([1, 2])])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_policy_gradient_takes_three(options: dict[str, Any], merged_ids: Tensor | None) -> None:
    chunked = {"merged_ids": merged_ids, "chunk_size": CHUNK}
    seen = watch(lambda h, w, t: sampled_loss(h, Head(w, **options), t, ones, **chunked)[0])
    assert passes(seen) == 3
    seen = watch(
        lambda h, w, t: linear_policy_gradient(
            h, w, t, lambda p, _: torch.ones_like(p), **chunked, **options
        )
    )
    assert passes(seen) == 3


def test_zero_coefficients_skip_the_gradient_matmuls() -> None:
    coefficient = torch.ones(N)
    coefficient[:CHUNK] = 0  # a whole chunk
    coefficient[CHUNK + 1 : N : 2] = 0  # every other token
    seen = watch(
        lambda h, w, t: linear_policy_gradient(
            h, w, t, lambda p, tokens: coefficient[tokens], chunk_size=CHUNK
        )
    )
    active = int((coefficient != 0).sum())
    assert passes(seen) == pytest.approx(1 + 2 * active / N)


@pytest.mark.parametrize("top_k", [None, 5])
def test_full_vocab_takes_four(top_k: int | None) -> None:
    teacher_hidden, teacher_weight = torch.randn(N, H), torch.randn(V, H)
    reward = rewards.create("power")
    seen = watch(
        lambda h, w, t: linear_full_vocab(
            h, w, teacher_hidden, teacher_weight, reward, 1.0, chunk_size=CHUNK, top_k=top_k
        )
    )
    assert passes(seen) == 4
    teacher = TeacherHead(teacher_hidden, Head(teacher_weight), reward=reward)
    options = {"top_k": top_k, "chunk_size": CHUNK}
    seen = watch(lambda h, w, t: full_vocab_loss(h, Head(w), t, teacher, 1.0, **options)[0])
    assert passes(seen) == 4


def test_a_teachers_values_take_four() -> None:
    head = Head(torch.randn(V, H))
    teacher = TeacherHead(torch.randn(N, H), head, reward=rewards.create("power"))
    seen = watch(lambda h, w, t: sampled_loss(h, Head(w), t, ones, teacher, chunk_size=CHUNK)[0])
    assert passes(seen) == 4


def test_frozen_head_takes_two() -> None:
    seen = watch(
        lambda h, w, t: linear_policy_gradient(
            h, w.detach(), t, lambda p, _: torch.ones_like(p), chunk_size=CHUNK
        )
    )
    assert passes(seen) == 2
