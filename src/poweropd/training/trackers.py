"""Experiment trackers: each keeps a run's numbers on this machine, in the run directory where it
can be told to, and reaches out to nobody unless the user's environment says so."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poweropd.errors import UsageError


def check_trackers(names: Sequence[str]) -> None:
    """accelerate leaves a tracker out without a word if its package is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"log.trackers: {', '.join(missing)} not installed: pip install 'poweropd[trackers]' "
            f"for tensorboard, else pip install {' '.join(missing)}"
        )


def tracker_options(names: Sequence[str], run: Path) -> dict[str, dict[str, Any]]:
    """What each tracker's start is given, for `Accelerator.init_trackers`.

    A user's own environment (WANDB_MODE, MLFLOW_TRACKING_URI, SWANLAB_MODE) comes first.
    """
    return {name: OPTIONS[name](run) for name in names if name in OPTIONS}


def _wandb(run: Path) -> dict[str, Any]:
    folder = _made(run / "trackers")
    return {"name": run.name, "dir": folder, "mode": os.environ.get("WANDB_MODE", "offline")}


def _mlflow(run: Path) -> dict[str, Any]:
    # It takes its store from the environment alone, or from a global of its own.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        import mlflow

        folder = _made(run.absolute() / "trackers")
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    return {"run_name": run.name}


def _trackio(run: Path) -> dict[str, Any]:
    return {"name": run.name}  # local unless TRACKIO_SPACE_ID names a Space


def _swanlab(run: Path) -> dict[str, Any]:
    return {"mode": os.environ.get("SWANLAB_MODE", "offline")}


def _made(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


OPTIONS = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio, "swanlab": _swanlab}
