"""What `poweropd doctor` finds: this machine, its packages, and the trainers with an adapter."""

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from poweropd.errors import IMPORT_FAILURES, UsageError, one_line
from poweropd.integrations.peers import PEERS, Probe, find_peer, installed

#: Distribution -> what it is for.
OPTIONAL = {
    "peft": "LoRA",
    "vllm": "fast rollouts",
    "flash-attn": "attention without padding on GPUs",
    "bitsandbytes": "a teacher in 4 or 8 bits",
    "lm-eval": "poweropd eval --harness",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Diagnosis:
    """One line of the screen."""

    name: str
    text: str
    is_wrong: bool = False


def machine_findings() -> Iterator[Diagnosis]:
    """Says what this machine has; nothing of it is wrong by being absent."""
    yield Diagnosis("python", f"{platform.python_version()} on {platform.system()}")
    for name in ("poweropd", "torch", "transformers", "accelerate"):
        yield Diagnosis(name, installed(name) or "not installed", installed(name) is None)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cuda = f"{', '.join(gpus)} (CUDA {torch.version.cuda})" if gpus else "none: the CPU is used"
    yield Diagnosis("GPU", cuda)
    for name, purpose in OPTIONAL.items():
        yield Diagnosis(name, installed(name) or f"not installed ({purpose})")
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    yield Diagnosis("chromium", browser or "not installed (tests of the report's page)")


def trainer_findings(names: Sequence[str]) -> Iterator[Diagnosis]:
    """Checks the trainers that were named, or all that are installed; raises UsageError."""
    for name in names:
        if name not in PEERS:
            raise UsageError(f"doctor: expected some of {', '.join(PEERS)}, got {name!r}")
    for name in names or PEERS:
        found = installed(name)
        if found is None:
            yield Diagnosis(name, "not installed", is_wrong=bool(names))
            continue
        try:
            peer = find_peer(name)
        except UsageError as error:
            yield Diagnosis(name, f"{found} cannot be imported: {error}", is_wrong=True)
            continue
        note = "" if found in peer.tested else f" (tested with {peer.tested})"
        yield Diagnosis(name, f"{found}{note}; {peer.flag}")
        for what, probe in peer.probes().items():
            yield probed(f"  {what}", probe)


def probed(name: str, probe: Callable[[], Probe]) -> Diagnosis:
    """Runs one probe of a trainer, whatever it raises."""
    try:
        found = probe()
    except (*IMPORT_FAILURES, LookupError, subprocess.TimeoutExpired) as error:
        return Diagnosis(name, one_line(f"{type(error).__name__}: {error}"), is_wrong=True)
    numbers = ", ".join(f"{value:.4f}" for value in found.rewards)
    verdict = "right" if found.is_right else "WRONG"
    return Diagnosis(name, f"{verdict}: {numbers} by {found.how}", not found.is_right)
