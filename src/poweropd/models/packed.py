"""Linear layers with weights that the CPU library has packed once, instead of in every call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class PackedLinears:
    """Packed copies of the weights of a model's linear layers.

    The weights are packed on creation and are not followed when they change. oneDNN then computes a
    row of a float32 layer to the same last bit in a batch of any size, which `nn.Linear` does not.
    On other devices, in other dtypes and without oneDNN nothing is packed.
    """

    def __init__(self, model: nn.Module) -> None:
        usable = torch.backends.mkldnn.is_available()
        self.layers = [
            (layer, _packed(layer))
            for layer in model.modules()
            if usable and type(layer) is nn.Linear and _packs(layer)
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lets the layers compute with their packed copies, and as they did before at the end."""
        for layer, packed in self.layers:
            vars(layer)["forward"] = packed
        try:
            yield
        finally:
            for layer, _ in self.layers:
                del vars(layer)["forward"]


def _packed(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Returns what computes the layer, for inference, from a packed copy of its weight."""
    with torch.inference_mode():
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        bias = None if layer.bias is None else layer.bias.detach()
    operation: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    return lambda inputs: operation(inputs, weight, bias, "none", [], "")


def _packs(layer: nn.Linear) -> bool:
    """Tells whether a layer is one that oneDNN packs, which nobody has given a forward yet."""
    weight = layer.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and "forward" not in vars(layer)
