"""The embedded student in a shape that vLLM's CPU attention takes: heads of 32 instead of 16."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from poweropd import embedded

NARROW, WIDE = 16, 32


@torch.no_grad()
def widened_student(folder: Path) -> Path:
    """The same function and the same training: every head gets 16 dimensions that stay zero.

    Rotary embeddings pair dimension i with i + d / 2 at the frequency base^(-2i / d), so the old
    pair i is the new pair 2i. Queries make up for attention's 1 / sqrt(d), and the norms of queries
    and keys for a mean over twice as many numbers.
    """
    source = embedded.path("student")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = model.state_dict()
    rotary = torch.tensor([2 * i for i in range(8)] + [2 * i + WIDE // 2 for i in range(8)])
    plain = torch.arange(NARROW)
    for name, tensor in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = _spread(tensor, rotary)
        elif name.endswith("v_proj.weight"):
            weights[name] = _spread(tensor, plain)
        elif name.endswith("o_proj.weight"):
            weights[name] = _spread(tensor.T, plain).T
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            scale = (NARROW / WIDE) ** 0.5 * (2**0.5 if "q_norm" in name else 1.0)
            weights[name] = _spread(tensor, rotary) * scale
    config: Any = model.config
    config.head_dim = WIDE
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wide.load_state_dict(weights)
    wide.save_pretrained(folder)
    for file in [*source.glob("*token*"), source / "generation_config.json"]:
        shutil.copy(file, folder)
    for file in source.glob("*.jinja"):
        shutil.copy(file, folder)
    return folder


def _spread(rows: Tensor, places: Tensor) -> Tensor:
    """[heads * 16, ...] -> [heads * 32, ...], the old dimensions of each head at `places`."""
    heads = rows.reshape(-1, NARROW, *rows.shape[1:])
    wide = heads.new_zeros(len(heads), WIDE, *rows.shape[1:])
    wide[:, places] = heads
    return wide.flatten(0, 1)
