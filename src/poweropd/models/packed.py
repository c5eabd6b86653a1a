"""Linear layers that compute a row alike in a batch of any size, and fast for few rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Weights of at least so many numbers are packed. A call of oneDNN takes some 30 us, in which a
# smaller layer is done without it; a larger one's weight is packed anew in every call but by this.
LEAST_PACKED = 2**19
# Plain matrix products of fewer rows are rounded otherwise.
LEAST_ROWS = 4


class PackedLinears:
    """Other ways to compute a model's linear layers, for inference in float32 on a CPU.

    Large weights are packed once, on creation, instead of in every call, and are not followed when
    they change. Both ways compute a row to the same last bit in a batch of any size, which
    `nn.Linear` does not. On other devices, in other dtypes and without oneDNN layers stay as they
    are.
    """

    def __init__(self, model: nn.Module) -> None:
        usable = torch.backends.mkldnn.is_available()
        self.layers = [
            (layer, _packed(layer) if layer.weight.numel() >= LEAST_PACKED else _steady(layer))
            for layer in model.modules()
            if usable and type(layer) is nn.Linear and _is_plain(layer)
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lets the layers compute in these ways, and as they did before at the end."""
        for layer, forward in self.layers:
            vars(layer)["forward"] = forward
        try:
            yield
        finally:
            for layer, _ in self.layers:
                del vars(layer)["forward"]


def _packed(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Returns what computes the layer from a packed copy of its weight."""
    with torch.inference_mode():
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        bias = None if layer.bias is None else layer.bias.detach()
    operation: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    return lambda inputs: operation(inputs, weight, bias, "none", [], "")


def _steady(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Returns what computes the layer with rows of zeros below few others."""
    weight, bias = layer.weight, layer.bias

    def forward(inputs: Tensor) -> Tensor:
        rows = inputs.numel() // inputs.shape[-1]
        if rows >= LEAST_ROWS:
            return linear(inputs, weight, bias)
        padded = inputs.new_zeros(LEAST_ROWS, inputs.shape[-1])
        padded[:rows] = inputs.reshape(rows, -1)
        return linear(padded, weight, bias)[:rows].reshape(*inputs.shape[:-1], -1)

    return forward


def _is_plain(layer: nn.Linear) -> bool:
    """Tells whether a layer is of float32 on a CPU, and nobody has given it a forward yet."""
    weight = layer.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and "forward" not in vars(layer)
