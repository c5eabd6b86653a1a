"""The experiment trackers, which get every step's metrics.

Each one keeps its numbers on this machine, inside the run directory if it can be told to, and
contacts no server unless the user's environment says so. This module imports no tracker, so the
recipe's validation may read the names from its table.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator

from poweropd.errors import UsageError

#: Keyword arguments for the start of a tracker.
Options = dict[str, str]


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError for a tracker that is not installed; accelerate would only leave it out."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"log.trackers: {', '.join(missing)} not installed: pip install 'poweropd[trackers]' "
            f"for tensorboard, else pip install {' '.join(missing)}"
        )


def tracker_options(names: Sequence[str], run: Path) -> dict[str, Options]:
    """Returns what the start of each tracker is given, for `Accelerator.init_trackers`.

    The user's own environment (WANDB_MODE, MLFLOW_TRACKING_URI, SWANLAB_MODE) comes first.
    """
    return {name: TRACKERS[name](run) for name in names}


def _tensorboard(run: Path) -> Options:
    """Returns nothing: the accelerator's project configuration names its folder."""
    return {}


def end_trackers(accelerator: Accelerator, engine: str) -> None:
    """Ends the trackers without ending process groups that vLLM still needs."""
    if accelerator.num_processes > 1 and engine != "vllm":
        accelerator.end_training()
        return
    # `end_training` would end process groups, too, which vLLM here shares and ends at exit.
    for tracker in accelerator.trackers:
        tracker.finish()


def _wandb(run: Path) -> Options:
    folder = _made(run / "trackers")
    return {"name": run.name, "dir": folder, "mode": os.environ.get("WANDB_MODE", "offline")}


def _mlflow(run: Path) -> Options:
    # mlflow takes its store from the environment alone, or from a global variable of its own.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        import mlflow

        folder = _made(run.absolute() / "trackers")
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    return {"run_name": run.name}


def _trackio(run: Path) -> Options:
    return {"name": run.name}  # local unless TRACKIO_SPACE_ID names a Space


def _swanlab(run: Path) -> Options:
    return {"mode": os.environ.get("SWANLAB_MODE", "offline")}


def _made(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


#: Name in `log.trackers` -> what its start is given for a run directory.
TRACKERS: dict[str, Callable[[Path], Options]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "swanlab": _swanlab,
}
