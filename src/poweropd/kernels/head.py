"""The LM head on a chunk of tokens: logits forward, and how large a chunk is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from poweropd.kernels.matmul import multiply

# Bytes of all [n, V] buffers of a call together, which decide the default chunk. The gradient of
# the weight is read and written once per chunk, so a GPU, with more operations per byte, wants
# longer chunks than a CPU.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}
# float16 has too few exponents for a gradient of 1 / N: its matmuls run in float32.
_OPERAND_DTYPES = {torch.float16: torch.float32}
# A bias of -inf, a masked id, counts as this: 0 * inf cannot arise, and exp(it) is 0 all the same.
LOWEST = -1e30


class HeadOptions(TypedDict, total=False):
    """What a `Head` has beside its weight, as keyword arguments."""

    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float


def head_options(config: Mapping[str, Any]) -> HeadOptions:
    """Returns what a transformers config, as a dict, does to the logits of its model.

    Cohere multiplies them and Granite divides them, Falcon-H1 and Muse have names of their own for
    a factor, HyperCLOVA X multiplies by what others divide by, and Gemma 2 and 3 soft-cap them.
    """
    factors = (config.get(name) for name in ("logit_scale", "output_multiplier"))
    scale = next((f for f in factors if f is not None), config.get("lm_head_multiplier"))
    divisor = config.get("logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if config.get("model_type") == "hyperclovax" else 1.0 / divisor
    options: HeadOptions = {"softcap": config.get("final_logit_softcapping")}
    return options if scale is None else {**options, "scale": float(scale)}


@dataclass(frozen=True)
class Head:
    """An LM head: logits = softcap(scale * (hidden @ weight.T + bias)) / temperature.

    softcap(x) = softcap * tanh(x / softcap), or x if `softcap` is None. A bias of -inf masks an id,
    also behind a soft-cap; its log-probability is then about -1e30. The weight may have another
    dtype than the hidden states: it is cast for the matmuls, and the gradient of float32 weights is
    not rounded.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def vocab_size(self) -> int:
        """Returns V, the number of ids."""
        return self.weight.shape[0]

    def check(self, hidden: Tensor, name: str = "") -> None:
        """Raises ValueError unless `hidden` [N, H] fits; `name` ("teacher ") starts the message."""
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
        """Returns the head as its matmuls with `hidden` take it.

        It has no gradient, the dtype of the matmuls, and a finite bias.
        """
        bias = self.bias
        if bias is not None:
            bias = bias.detach().to(accumulation_dtype(bias)).clamp(min=LOWEST)
        return replace(self, weight=self.weight.detach().to(_operand_dtype(hidden)), bias=bias)

    def logits(self, hidden: Tensor, out: Tensor, slope: Tensor | None = None) -> Tensor:
        """Writes the logits [n, V] into `out`, and d softcap(x) / dx into `slope` if given."""
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
            if self.bias is not None:  # the cap has made a masked id's logit a moderate one
                out.masked_fill_(self.bias <= LOWEST, LOWEST)
        return out


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Returns float32, or float64 for a float64 tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def operand(tensor: Tensor) -> Tensor:
    """Returns the tensor in the dtype of its matmuls."""
    return tensor.to(_operand_dtype(tensor))


def _operand_dtype(hidden: Tensor) -> torch.dtype:
    return _OPERAND_DTYPES.get(hidden.dtype, hidden.dtype)


def chunk_rows(hidden: Tensor, vocab_size: int, buffers: int, chunk_size: int | None) -> int:
    """Returns the tokens per chunk: `chunk_size`, or so many that `buffers` fit in CHUNK_BYTES.

    A buffer is [tokens, V] in the accumulation dtype.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected an integer >= 1, got {chunk_size}")
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    fitting = budget // (vocab_size * buffers * accumulation_dtype(hidden).itemsize)
    # Matmuls like multiples of 64; with fewer than 128 tokens the weight would be read too often.
    rows = chunk_size or max(128, fitting // 64 * 64)
    return min(rows, max(1, hidden.shape[0]))


def chunks(num_tokens: int, rows: int) -> Iterator[slice]:
    """Yields slices of `rows` tokens each, the last of the rest."""
    for start in range(0, num_tokens, rows):
        yield slice(start, min(start + rows, num_tokens))
