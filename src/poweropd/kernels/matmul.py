"""Matrix products of low-precision operands that accumulate, and stay, in float32."""

import torch
from torch import Tensor

# Since torch 2.10 (pytorch#167931) CUDA's addmm adds bf16 products to a float32 matrix in place.
_CUDA_ACCUMULATES = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10)


def multiply(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> Tensor:
    """Writes factor * a @ b into `out`, which may be float32 for bf16 operands."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # the CPU sums in float32 too, but rounds the result to the operands' dtype
        out.copy_(torch.mm(a, b))
    # Not by addmm's alpha, which multiplies, and rounds, an operand on a CPU.
    return out if factor == 1.0 else out.mul_(factor)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Adds a @ b to `total`, without a temporary of its size if torch can do that."""
    if a.dtype == b.dtype == total.dtype:
        return total.addmm_(a, b)
    if not total.is_cuda:
        return total.addmm_(a.to(total.dtype), b.to(total.dtype))
    if _CUDA_ACCUMULATES:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(torch.mm(a, b, out_dtype=total.dtype))
