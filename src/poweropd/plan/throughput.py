"""How fast a run goes: measured in another run, or given, or assumed."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from poweropd.config import Config
from poweropd.errors import UsageError
from poweropd.runs.directory import RunDirectory

WARM_UP = 1  # steps at the start of a measured run that are left out, if it has more


@dataclass(frozen=True)
class Throughput:
    """Of one GPU. `source` says where the figures are from."""

    rollout: float | None  # completion tokens per second; None where it is not known
    flops: float  # FLOP/s in scoring and update
    sync: float  # seconds per step
    source: str

    def seconds(self, tokens: float, flops: float) -> dict[str, float | None]:
        """Of a step by phase, for what one GPU has to do."""
        return {
            "rollout": None if self.rollout is None else tokens / self.rollout,
            "score and update": flops / self.flops,
            "sync": self.sync,
        }


@dataclass(frozen=True)
class Measured:
    """Medians of a run's steps."""

    config: Config
    rollout: float  # seconds
    busy: float  # seconds of scoring and update
    sync: float  # seconds
    mean_length: float  # tokens of a completion

    @classmethod
    def read(cls, path: Path) -> "Measured":
        """From a run directory's config.yaml and metrics.jsonl."""
        run = RunDirectory(path)
        if not run.config_path.exists():
            raise UsageError(f"--measured: expected a run directory with config.yaml, got {path}")
        rows = [row for row in run.metrics() if "seconds/step" in row]
        if not rows:
            raise UsageError(f"--measured: {run.metrics_path} holds no step with its seconds")
        rows = rows[WARM_UP:] or rows
        return cls(
            config=run.config(),
            rollout=_median(rows, "seconds/rollout"),
            busy=median(row["seconds/score"] + row["seconds/update"] for row in rows),
            sync=_median(rows, "seconds/sync"),
            mean_length=_median(rows, "completions/mean_length"),
        )


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return median(row[key] for row in rows)
