"""The run directory, and the reward statistics in it. Modules load on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poweropd.records.recorder import RewardRecorder, RewardRecords
    from poweropd.records.run import (
        RunDirectory,
        completion_metrics,
        distribution,
        environment,
        read_jsonl,
        recover_jsonl,
        replaced_directory,
        write_atomically,
    )

_HOMES = {
    "RewardRecorder": "recorder",
    "RewardRecords": "recorder",
    "RunDirectory": "run",
    "completion_metrics": "run",
    "distribution": "run",
    "environment": "run",
    "read_jsonl": "run",
    "recover_jsonl": "run",
    "replaced_directory": "run",
    "write_atomically": "run",
}
__all__ = [
    "RewardRecorder",
    "RewardRecords",
    "RunDirectory",
    "completion_metrics",
    "distribution",
    "environment",
    "read_jsonl",
    "recover_jsonl",
    "replaced_directory",
    "write_atomically",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(f"{__name__}.{_HOMES[name]}"))[name]
