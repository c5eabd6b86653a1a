"""Parameters in shards over the processes: FSDP2 of a module, and whole tensors out of shards."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; of a sharded one, on every process, if all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def collected(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, by name, one at a time; {} where not to `keep`.

    All processes call it; usually the main one keeps.
    """
    kept = {}
    for name, tensor in tensors:
        full = whole(tensor.detach())
        if keep:
            kept[name] = full.cpu()
    return kept
