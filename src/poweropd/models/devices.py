"""GPUs by name: the memory and the peak that their makers state; the dtype of this machine."""

import re
from dataclasses import dataclass

import torch

from poweropd.errors import import_object
from poweropd.models import AUTO_DTYPE, DTYPES


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker states it: memory in GiB, and FLOP/s of dense bf16 matmuls."""

    memory: float
    peak_flops: float


GPUS = {
    "H100": Gpu(80, 989e12),
    "H100 PCIe": Gpu(80, 756e12),
    "H100 NVL": Gpu(94, 835e12),
    "H200": Gpu(141, 989e12),
    "B200": Gpu(180, 2250e12),
    "A100": Gpu(80, 312e12),
    "L40S": Gpu(48, 362e12),
    "L4": Gpu(24, 121e12),
    "A10": Gpu(24, 125e12),
    "RTX 4090": Gpu(24, 165e12),
    "RTX 3090": Gpu(24, 71e12),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns FLOP/s of dense matmuls in bf16 or float16; None if they are not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(device_name: str) -> float | None:
    """Returns the peak of a device by its driver's name for it; None if that is not known."""
    words = set(re.split(r"[\s-]+", device_name))
    found = [name for name in GPUS if set(name.split()) <= words]
    return GPUS[max(found, key=len)].peak_flops if found else None


def dtype_here(name: str) -> str:
    """Returns a dtype's name; auto is bfloat16 where this machine computes in it, else float32.

    A CPU without instructions for bfloat16, and a GPU that only emulates it, are slower in it.
    """
    return name if name != AUTO_DTYPE else "bfloat16" if _has_bfloat16() else "float32"


def torch_dtype(name: str) -> torch.dtype:
    """Returns the dtype that a recipe names, auto included."""
    dtype: torch.dtype = import_object("dtype", DTYPES[dtype_here(name)])
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """Returns the name of a dtype in a recipe."""
    return next(name for name in DTYPES if torch_dtype(name) == dtype)


def _has_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
