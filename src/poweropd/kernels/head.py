"""The LM head on a chunk of tokens: logits forward, and how large a chunk is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poweropd.kernels.matmul import multiply

# Bytes of all [n, V] buffers of a call together, which set the default chunk. The gradient of
# the weight is read and written once per chunk, so a GPU, with more operations per byte, wants
# longer chunks than a CPU.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}
# float16 has too few exponents for a gradient of 1 / N: its matmuls run in float32.
_OPERAND_DTYPES = {torch.float16: torch.float32}
# A bias of -inf, a masked id, counts as this: 0 * inf cannot arise, and exp(it) is 0 all the same.
LOWEST = -1e30


@dataclass(frozen=True)
class Head:
    """An LM head: logits = softcap(scale * (hidden @ weight.T + bias)) / temperature.

    softcap(x) = softcap * tanh(x / softcap), or x where `softcap` is None. A bias of -inf masks
    an id; its log-probability is then about -1e30. The weight may have another dtype than the
    hidden states: it is cast for the matmuls, and the gradient of float32 weights is not rounded.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the weight, as keyword arguments of the kernels."""
        return {
            "bias": self.bias,
            "scale": self.scale,
            "softcap": self.softcap,
            "temperature": self.temperature,
        }

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def check(self, hidden: Tensor, name: str = "") -> None:
        """ValueError unless `hidden` [N, H] fits; `name` ("teacher ") starts the message."""
        weight, bias = self.weight, self.bias
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name}hidden and weight: expected [N, H] and [V, H], "
                f"got {list(hidden.shape)} and {list(weight.shape)}"
            )
        if not hidden.is_floating_point() or not weight.is_floating_point():
            raise ValueError(
                f"{name}hidden and weight: expected float dtypes, "
                f"got {hidden.dtype} and {weight.dtype}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}bias: expected [{self.vocab_size}], got {list(bias.shape)}")
        for option, value in (("softcap", self.softcap), ("temperature", self.temperature)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}{option}: expected a number > 0, got {value}")

    def prepared(self, hidden: Tensor) -> "Head":
        """The head as its matmuls with `hidden` take it: no gradient, their dtype, finite bias."""
        bias = self.bias
        if bias is not None:
            bias = bias.detach().to(accumulation_dtype(bias)).clamp(min=LOWEST)
        return replace(self, weight=self.weight.detach().to(_operand_dtype(hidden)), bias=bias)

    def logits(self, hidden: Tensor, out: Tensor, slope: Tensor | None = None) -> Tensor:
        """[n, V] logits into `out`; with `slope`, d softcap(x) / dx into it."""
        cap = self.softcap
        before = self.scale / (self.temperature if cap is None else cap)
        multiply(operand(hidden.detach()), self.weight.T, out, before)
        if self.bias is not None:
            out.add_(self.bias, alpha=before)
        if cap is not None:
            out.tanh_()
            if slope is not None:
                torch.mul(out, out, out=slope).neg_().add_(1.0)
            out.mul_(cap / self.temperature)
        return out


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def operand(tensor: Tensor) -> Tensor:
    return tensor.to(_operand_dtype(tensor))


def _operand_dtype(hidden: Tensor) -> torch.dtype:
    return _OPERAND_DTYPES.get(hidden.dtype, hidden.dtype)


def chunk_rows(hidden: Tensor, vocab_size: int, buffers: int, chunk_size: int | None) -> int:
    """Tokens per chunk: `chunk_size`, or what fits `buffers` [n, V] buffers in CHUNK_BYTES."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected an integer >= 1, got {chunk_size}")
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    fitting = budget // (vocab_size * buffers * accumulation_dtype(hidden).itemsize)
    # Matmuls like multiples of 64; with less than 128 rows the weight would be read too often.
    rows = chunk_size or max(128, fitting // 64 * 64)
    return min(rows, max(1, hidden.shape[0]))


def chunks(num_tokens: int, rows: int) -> Iterator[slice]:
    for start in range(0, num_tokens, rows):
        yield slice(start, min(start + rows, num_tokens))


class Buffer:
    """An uninitialised [rows, V] buffer that every chunk uses again."""

    def __init__(self, hidden: Tensor, rows: int, vocab_size: int) -> None:
        self.whole = hidden.new_empty(rows, vocab_size, dtype=accumulation_dtype(hidden))

    def of(self, tokens: slice) -> Tensor:
        """[n, V] for the n tokens of a chunk."""
        return self.whole[: tokens.stop - tokens.start]
