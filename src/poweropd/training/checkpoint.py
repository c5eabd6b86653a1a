"""Checkpoints that are whole or absent, and known to be whole when they are taken up.

A checkpoint is written into a temporary directory, flushed to disk and renamed to
`step-N`, so a kill at any moment leaves the last complete one in place. It holds the trained
parameters, the optimizer, the loop's state, and a checksum of each (`sha256sum -c` reads them); all
randomness is a function of the step.
"""

import hashlib
import json
import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from poweropd.errors import RunError
from poweropd.runs.files import replaced_directory

logger = logging.getLogger("poweropd")

State = dict[str, Any]  # of the optimizer, as torch has it, or of the loop, as JSON
Loaded = tuple[dict[str, Tensor], State, State]  # weights, optimizer, loop
WEIGHTS, OPTIMIZER, STATE = "student.safetensors", "optimizer.pt", "state.json"
CHECKSUMS = "checksums.sha256"
NAME = re.compile(r"step-(\d+)")
# What reading a damaged file raises.
DAMAGE: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, RuntimeError, EOFError)
DAMAGE += (SafetensorError, pickle.UnpicklingError)


def save_checkpoint(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: State,
    state: State,
    keep: int,
) -> Path:
    """Writes `folder/step-N` and removes all but the newest `keep` checkpoints.

    Raises OSError if it cannot be written, with what was there left as it was.
    """
    target = folder / f"step-{step}"
    with replaced_directory(target) as temporary:
        try:
            save_file({k: v.detach().contiguous() for k, v in weights.items()}, temporary / WEIGHTS)
            torch.save(optimizer, temporary / OPTIMIZER)
        except (SafetensorError, RuntimeError) as error:  # how these two say that a disk is full
            raise RunError(
                f"{target}: cannot write the checkpoint ({str(error).splitlines()[0][:160]}): free "
                "some space and run the same command; it goes on from the checkpoint before"
            ) from error
        (temporary / STATE).write_text(json.dumps({"step": step, **state}))
        lines = [f"{digest(temporary / name)}  {name}\n" for name in (WEIGHTS, OPTIMIZER, STATE)]
        (temporary / CHECKSUMS).write_text("".join(lines))
    for old in _complete(folder)[:-keep]:
        # Renamed first: a kill during the removal must not leave half a checkpoint behind.
        old.rename(old.with_name(f".tmp-old-{old.name}"))
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)
    return target


def load_latest(folder: Path) -> Loaded | None:
    """Loads the newest whole checkpoint, on the CPU; None if there is no checkpoint at all.

    Warns about newer ones that are damaged. Raises RunError if all are.
    """
    found = _complete(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except DAMAGE as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            logger.warning("%s is damaged (%s): an older checkpoint is taken", path, reason)
    if found:
        raise RunError(
            f"{folder}: none of its {len(found)} checkpoints is whole: restore one, or delete the "
            "run directory to begin anew"
        )
    return None


def load_checkpoint(path: Path) -> Loaded:
    """Loads weights, optimizer state and loop state, on the CPU.

    Raises one of `DAMAGE` if a file is missing, cut short or changed.
    """
    if (path / CHECKSUMS).exists():  # those of the first edition have none
        for line in (path / CHECKSUMS).read_text().splitlines():
            expected, _, name = line.partition("  ")
            if digest(path / name) != expected:
                raise ValueError(f"{name} has another checksum than when it was written")
    weights, state = load_file(path / WEIGHTS), json.loads((path / STATE).read_text())
    optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    return weights, optimizer, dict(state)


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _complete(folder: Path) -> list[Path]:
    """Returns the checkpoints in the order of their steps; leftovers of a kill are none."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]
