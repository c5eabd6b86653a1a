"""Parameters in shards over the processes (FSDP2), and whole tensors out of shards and back.

Everything here works on a plain module as well, where a tensor is its own whole.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from poweropd.errors import UsageError


def shard(module: nn.Module, layers: Sequence[nn.Module], compute_dtype: torch.dtype) -> None:
    """Shards `module` in place over all processes, each of its `layers` a unit of its own.

    Layers are gathered in the compute dtype, so that autograd keeps no cast copy of a weight whose
    shards are freed; the rest (embeddings, head, last norm) as it is. Gradients are reduced in
    float32, after every backward: kept back for later ones, they would be whole on each process.
    """
    device = next(module.parameters()).device.type
    mesh = init_device_mesh(device, (get_world_size(),))
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """Returns the full tensor; every process must call this if the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Returns this process's share of a full tensor if the parameter of that shape is sharded."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    local = tensor.to(parameter.device)
    # Without a source rank nothing is sent: every process has the full tensor and cuts it.
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def collected(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Gathers whole tensors one at a time and returns them on the CPU by name; {} without `keep`.

    All processes must call it; usually the main one keeps.
    """
    kept = {}
    for name, tensor in tensors:
        full = whole(tensor.detach())
        if keep:
            kept[name] = full.cpu()
    return kept


def optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """Returns the optimizer's `state_dict` with whole tensors on the CPU, as `collected` does."""
    found = optimizer.state_dict()
    state = {i: collected(values.items(), keep) for i, values in found["state"].items()}
    return {**found, "state": state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
    """Takes up what `optimizer_state` kept, sharded or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {key: like(value, parameters[i]) for key, value in values.items()}
        for i, values in found["state"].items()
    }
    optimizer.load_state_dict({**found, "state": state})


def check_launch() -> None:
    """Raises UsageError if accelerate was told to shard the student.

    It would do so its own way or, on a CPU, not at all without a word.
    """
    for plugin in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false") == "true":
            raise UsageError(
                f"accelerate launch: expected plain data parallelism, got --use_{plugin.lower()} "
                "(or an accelerate config that says so): leave it out and set train.sharding=fsdp2"
            )
