"""An LM head by chunks of tokens: their logits, and the gradient accumulated over all chunks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poweropd.kernels.head import Head, accumulation_dtype, chunk_rows, chunks, operand
from poweropd.kernels.matmul import add_product, multiply
from poweropd.kernels.softmax import Actions, check_tokens, unique_ids


class ChunkedHead:
    """A head over N hidden states and their targets, by chunks that share a buffer of logits.

    The gradients of hidden [N, H], weight [V, H] and bias [V] are accumulated if autograd asks
    for them, that is, if gradients are enabled and the tensor requires one.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor | None,
        merged_ids: Tensor | None,
        chunk_size: int | None,
        *,
        more_buffers: int = 0,
        owner: str = "",
    ) -> None:
        """Makes room for chunks of `chunk_size` tokens; if None, as many as fit in a fixed memory.

        `more_buffers` says how many [n, V] buffers share that memory beside those made here.
        Raises ValueError for wrong shapes or dtypes; `owner` ("teacher ") starts the message.
        """
        head.check(hidden, owner)
        if targets is not None:
            check_tokens(f"{owner}targets", targets, hidden.shape[0], torch.int64)
        self.targets, self.merged_ids = targets, unique_ids(merged_ids)
        self.inputs = (hidden, head.weight, head.bias)
        self.hidden, self.head = hidden.detach(), head.prepared(hidden)
        self.num_tokens, self.vocab_size = hidden.shape[0], head.vocab_size
        dtype = accumulation_dtype(hidden)
        # The gradient of the hidden states is written once per token: it needs no more precision.
        self._d_hidden = _zeros_if_needed(hidden, hidden.dtype)
        self._d_weight = _zeros_if_needed(head.weight, dtype)
        self._d_bias = None if head.bias is None else _zeros_if_needed(head.bias, dtype)
        capped = head.softcap is not None and self.needs_gradient
        self.rows = chunk_rows(hidden, self.vocab_size, 1 + capped + more_buffers, chunk_size)
        self.chunks = list(chunks(self.num_tokens, self.rows))
        # Every chunk uses these again: its logits, and the soft-cap's slope at them.
        self._buffer = hidden.new_empty(self.rows, self.vocab_size, dtype=dtype)
        self._slopes = torch.empty_like(self._buffer) if capped else None

    @property
    def needs_gradient(self) -> bool:
        """Returns whether autograd asks for any gradient."""
        return any(t is not None for t in (self._d_hidden, self._d_weight, self._d_bias))

    def logits(self, tokens: slice) -> Tensor:
        """Returns the logits [n, V] of a chunk, in the buffer."""
        n = tokens.stop - tokens.start
        slope = None if self._slopes is None else self._slopes[:n]
        return self.head.logits(self.hidden[tokens], self._buffer[:n], slope)

    def actions(self, tokens: slice, logits: Tensor) -> Actions:
        """Returns what the tokens of a chunk did, from their logits or log-probs [n, V]."""
        assert self.targets is not None, "without targets there is no action"
        return Actions.of(logits, self.targets[tokens], self.merged_ids)

    def add_gradient(self, d_logits: Tensor, weights: Tensor, tokens: slice) -> None:
        """Adds weights [n] * d_logits [n, V], the gradient by the logits of the chunk `tokens`.

        Overwrites `d_logits`. A token of weight zero costs no matmul.
        """
        slope = None if self._slopes is None else self._slopes[: len(weights)]
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
        self._multiply_out(d_logits, factors, rows)

    def _multiply_out(self, d_inner: Tensor, factors: Tensor, rows: slice | Tensor) -> None:
        """Adds factors [k] * d_inner [k, V], the gradient by hidden @ weight.T + bias at `rows`.

        The factors go to the narrow side of each product, which saves a pass over [k, V].
        """
        if self._d_bias is not None:
            self._d_bias.add_(factors @ d_inner)
        inputs = operand(self.hidden[rows])
        low = d_inner.to(inputs.dtype)
        if self._d_hidden is not None:
            part = multiply(low, self.head.weight, d_inner.new_empty(inputs.shape))
            self._d_hidden[rows] = part.mul_(factors[:, None]).to(self.hidden.dtype)
        if self._d_weight is not None:
            scaled = inputs * factors[:, None]
            # On the CPU the accumulator takes float32 operands, which d_inner already is.
            if low.is_cuda:
                add_product(self._d_weight, low.T, scaled.to(low.dtype))
            else:
                add_product(self._d_weight, d_inner.T, scaled)

    def attach(self, loss: Tensor) -> Tensor:
        """Returns `loss`, a scalar without history, as a function of hidden, weight and bias.

        Its gradients are those accumulated, and can be backpropagated once.
        """
        if not self.needs_gradient:
            return loss
        found = (self._d_hidden, self._d_weight, self._d_bias)
        gradients = [
            None if g is None or t is None else g.to(t.dtype)
            for g, t in zip(found, self.inputs, strict=True)
        ]
        return _Attached.apply(loss, gradients, *self.inputs)


def _zeros_if_needed(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    needed = torch.is_grad_enabled() and tensor.requires_grad
    return tensor.new_zeros(tensor.shape, dtype=dtype) if needed else None


def _to_front(active: Tensor, buffers: Sequence[Tensor]) -> Tensor:
    """Moves the k active tokens of [n, V] buffers to their front; returns [k] which these were.

    Tokens at the front stay and the others fill the gaps: a copy of all k could double the memory.
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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss can be backpropagated once: its gradient is given away")
        # In place, and given away: no copy of a [V, H] gradient, and no sync to look for a 1.
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_output)
        return None, None, *gradients
