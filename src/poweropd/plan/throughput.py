"""The speed of a run: measured in another run, or given, or assumed."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from poweropd.config import Config
from poweropd.errors import UsageError
from poweropd.runs.directory import RunDirectory

WARM_UP = 1  # steps at the start of a measured run that are left out, if it has more


@dataclass(frozen=True)
class Throughput:
    """The speed of one GPU; `source` says where the figures come from."""

    rollout: float | None  # completion tokens per second; None if not known
    flops: float  # FLOP/s in scoring and update
    sync: float  # seconds per step
    source: str

    def seconds(self, tokens: float, flops: float) -> dict[str, float | None]:
        """Returns the seconds of each phase for one GPU's tokens and FLOPs in a step."""
        return {
            "rollout": None if self.rollout is None else tokens / self.rollout,
            "score and update": flops / self.flops,
            "sync": self.sync,
        }


@dataclass(frozen=True)
class Measured:
    """Medians over the steps of a run."""

    config: Config
    rollout: float  # seconds
    busy: float  # seconds of scoring and update
    sync: float  # seconds
    mean_length: float  # completion length in tokens

    @classmethod
    def read(cls, path: Path) -> "Measured":
        """Reads config.yaml and metrics.jsonl of a run directory."""
        run = RunDirectory(path)
        if not run.config_path.exists():
            raise UsageError(f"--measured: expected a run directory with config.yaml, got {path}")
        rows = [row for row in run.metrics() if "seconds/step" in row]
        if not rows:
            raise UsageError(f"--measured: {run.metrics_path} holds no step with its seconds")
        rows = rows[WARM_UP:] or rows
        return cls(
            config=Config.load(run.config_path),
            rollout=median(row["seconds/rollout"] for row in rows),
            busy=median(row["seconds/score"] + row["seconds/update"] for row in rows),
            sync=median(row["seconds/sync"] for row in rows),
            mean_length=median(row["completions/mean_length"] for row in rows),
        )
