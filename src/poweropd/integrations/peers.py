"""The trainers that have an adapter, and the checks that keep an adapter from training nonsense."""

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from poweropd.errors import UsageError, import_object

#: Trainer, as `poweropd doctor` calls it -> its `Peer`.
PEERS = {
    "verl": "poweropd.integrations.verl:Verl",
    "trl": "poweropd.integrations.trl:TRL",
    "slime": "poweropd.integrations.slime:Slime",
    "ms-swift": "poweropd.integrations.ms_swift:MsSwift",
    "nemo-rl": "poweropd.integrations.nemo_rl:NeMoRL",
    "prime-rl": "poweropd.integrations.prime_rl:PrimeRL",
    "skyrl": "poweropd.integrations.skyrl:SkyRL",
}

#: Log-probs of two tokens and their rewards t^5 - p^5: what every probe compares.
PROBE_TEACHER, PROBE_STUDENT = (-0.1, -2.0), (-1.0, -0.2)
PROBE_REWARDS = (0.599792712713548, -0.36783404124167984)
PROBE_TOLERANCE = 1e-6


def installed(distribution: str) -> str | None:
    """Returns the version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Probe:
    """What two tokens became inside a trainer."""

    rewards: tuple[float, ...]
    how: str  # which function of the trainer was run

    @property
    def is_right(self) -> bool:
        """Returns whether these are the rewards of PowerOPD's equation at alpha 5."""
        pairs = zip(self.rewards, PROBE_REWARDS, strict=False)
        return len(self.rewards) == 2 and all(abs(a - b) < PROBE_TOLERANCE for a, b in pairs)


class Peer(ABC):
    """A trainer of somebody else's, as far as an adapter depends on it."""

    distribution: ClassVar[str]  # what pip calls it
    tested: ClassVar[str]  # the versions, or the commit, that the adapter was run with
    flag: ClassVar[str]  # what switches the reward on

    @abstractmethod
    def probe(self) -> Probe:
        """Runs the reward on two tokens by the trainer's own code; the trainer is installed."""

    def probes(self) -> dict[str, Callable[[], Probe]]:
        """Returns what `poweropd doctor` runs: what is tried -> how."""
        return {"two tokens": self.probe}

    @property
    def version(self) -> str | None:
        """Returns the installed version, or None if it is not installed."""
        return installed(self.distribution)

    def refusal(self, what: str) -> UsageError:
        """Returns the error for a trainer in which something is not as the adapter expects."""
        return UsageError(
            f"{self.distribution} {self.version or '(version unknown)'}: {what}; poweropd was "
            f"tested with {self.distribution} {self.tested}: install that, or a newer poweropd"
        )

    def check_parameters(self, function: Callable[..., object], expected: Sequence[str]) -> None:
        """Raises UsageError unless a function of the trainer takes these parameters first."""
        found = list(inspect.signature(function).parameters)
        if found[: len(expected)] != list(expected):
            raise self.refusal(
                f"{function.__module__}.{function.__qualname__} takes ({', '.join(found)}), "
                f"expected ({', '.join(expected)})"
            )

    def attribute(self, module: str, name: str) -> Callable[..., Any]:
        """Returns a function or class of the trainer; raises UsageError if it is not there."""
        try:
            found: Callable[..., Any] = import_object(self.distribution, f"{module}:{name}")
        except UsageError as error:
            raise self.refusal(f"{module}.{name} cannot be had ({error})") from error
        return found

    def replace(
        self, module: str, path: str, ours: Callable[..., object], expected: Sequence[str]
    ) -> None:
        """Puts a function in the place of the trainer's "function" or "Class.method", once.

        Raises UsageError if that is not there, or does not take these parameters first.
        """
        head, _, method = path.partition(".")
        found = self.attribute(module, head)
        owner, name = (found, method) if method else (sys.modules[module], head)
        current = vars(owner).get(name)
        if current is ours:
            return
        if current is None:
            raise self.refusal(f"{module}.{path} is not there")
        self.check_parameters(current, expected)
        setattr(owner, name, ours)


def find_peer(name: str) -> Peer:
    """Returns what is known of a trainer of `PEERS`."""
    peer: Peer = import_object("integration", PEERS[name])()
    return peer
