"""Checkpoints that are whole or absent.

A checkpoint is written into a temporary directory, flushed to disk and renamed to
`step-N`, so a kill at any moment leaves the last complete one in place. It holds the trained
parameters, the optimizer and the loop's state; all randomness is a function of the step.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poweropd.runs.files import replaced_directory

WEIGHTS, OPTIMIZER, STATE = "student.safetensors", "optimizer.pt", "state.json"
NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: Any,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `folder/step-N` and removes all but the newest `keep` checkpoints."""
    target = folder / f"step-{step}"
    with replaced_directory(target) as temporary:
        save_file({k: v.detach().contiguous() for k, v in weights.items()}, temporary / WEIGHTS)
        torch.save(optimizer, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps({"step": step, **state}))
    for old in _complete(folder)[:-keep]:
        # Renamed first: a kill during the removal must not leave half a checkpoint behind.
        old.rename(old.with_name(f".tmp-old-{old.name}"))
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None. Leftovers of a kill are never considered."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
    """weights, optimizer state and loop state, on the CPU."""
    return (
        load_file(path / WEIGHTS),
        torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True),
        json.loads((path / STATE).read_text()),
    )


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]
