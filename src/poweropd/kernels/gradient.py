"""The gradient of an LM head, accumulated over chunks, and given to autograd as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poweropd.kernels.head import Head, accumulation_dtype, operand
from poweropd.kernels.matmul import add_product, multiply


@dataclass
class HeadGradient:
    """Accumulates the gradients of hidden [N, H], weight [V, H] and bias [V] over chunks."""

    head: Head  # prepared
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, hidden: Tensor, head: Head) -> "HeadGradient":
        """Zeros for what autograd asks a gradient of; None elsewhere."""
        return cls(
            head.prepared(hidden),
            # Written once per row, so it needs no more than its own precision.
            _zeros_if_needed(hidden, hidden.dtype),
            _zeros_if_needed(head.weight, accumulation_dtype(hidden)),
            None if head.bias is None else _zeros_if_needed(head.bias, accumulation_dtype(hidden)),
        )

    @property
    def needed(self) -> bool:
        return any(t is not None for t in (self.hidden, self.weight, self.bias))

    def add(
        self,
        d_logits: Tensor,
        slope: Tensor | None,
        weights: Tensor,
        hidden: Tensor,
        tokens: slice,
    ) -> None:
        """Adds weights [n] * d_logits [n, V], the gradient by the logits of the chunk `tokens`.

        Overwrites `d_logits` and `slope`. Rows of weight zero cost no matmul.
        """
        rows: slice | Tensor = tokens
        active = (weights != 0).cpu()  # the one sync of a chunk: how much is left to do
        count = int(active.sum())
        if count == 0:
            return
        if count < len(active):
            kept = _to_front(active, [d_logits] if slope is None else [d_logits, slope])
            kept = kept.to(weights.device)
            d_logits, weights, rows = d_logits[:count], weights[kept], kept + tokens.start
            slope = None if slope is None else slope[:count]
        if slope is not None:
            d_logits.mul_(slope)
        factors = weights.to(d_logits.dtype) * (self.head.scale / self.head.temperature)
        self._multiply_out(d_logits, factors, hidden.detach(), rows)

    def _multiply_out(
        self, d_inner: Tensor, factors: Tensor, hidden: Tensor, rows: slice | Tensor
    ) -> None:
        """Adds factors [k] * d_inner [k, V], the gradient by hidden @ weight.T + bias at `rows`.

        The factors go to the narrow side of each product, which saves a pass over [k, V].
        """
        if self.bias is not None:
            self.bias.add_(factors @ d_inner)
        inputs = operand(hidden[rows])
        low = d_inner.to(inputs.dtype)
        if self.hidden is not None:
            part = multiply(low, self.head.weight, d_inner.new_empty(inputs.shape))
            self.hidden[rows] = part.mul_(factors[:, None]).to(hidden.dtype)
        if self.weight is not None:
            scaled = inputs * factors[:, None]
            # On the CPU the accumulator takes float32 operands, which d_inner already is.
            if low.is_cuda:
                add_product(self.weight, low.T, scaled.to(low.dtype))
            else:
                add_product(self.weight, d_inner.T, scaled)

    def attach(self, loss: Tensor, hidden: Tensor, head: Head) -> Tensor:
        """`loss`, a scalar without history, as a differentiable function of the head's inputs."""
        if not self.needed:
            return loss
        inputs = (hidden, head.weight, head.bias)
        gradients = [
            None if g is None or t is None else g.to(t.dtype)
            for g, t in zip((self.hidden, self.weight, self.bias), inputs, strict=True)
        ]
        return _Attached.apply(loss, gradients, *inputs)


def _zeros_if_needed(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    needed = torch.is_grad_enabled() and tensor.requires_grad
    return tensor.new_zeros(tensor.shape, dtype=dtype) if needed else None


def _to_front(active: Tensor, buffers: Sequence[Tensor]) -> Tensor:
    """Moves the k active rows of [n, V] buffers to their front; [k] which rows these were.

    Rows at the front stay and the others fill the gaps: a copy of all k could double the memory.
    """
    count = int(active.sum())
    kept = torch.arange(count)
    gaps = (~active[:count]).nonzero().squeeze(1)
    kept[gaps] = active[count:].nonzero().squeeze(1) + count
    for buffer in buffers:
        buffer[gaps.to(buffer.device)] = buffer[kept[gaps].to(buffer.device)]
    return kept


class _Attached(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None
    ) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss can be backpropagated once: its gradient is given away")
        # In place, and given away: no copy of a [V, H] gradient, and no sync to look for a 1.
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_output)
        return None, None, *gradients
