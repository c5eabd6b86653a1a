"""The progress of a run: a bar on a terminal, a line now and then in a log file."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES_IN_A_LOG = 20  # of a whole run, where the output is not a terminal


class TrainingProgress:
    """Shows the numbers that matter after each step; silent where `enabled` is False."""

    def __init__(self, steps: int, done: int, name: str, enabled: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not enabled)
        self.steps, self.name = steps, name
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            disable=not self.console.is_terminal or not enabled,
        )
        self.task = self.bar.add_task(name, total=steps, completed=done, numbers="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = " ".join(
            f"{label} {metrics[key]:{form}}"
            for key, (label, form) in SHOWN.items()
            if metrics.get(key) is not None
        )
        self.bar.update(self.task, completed=step, numbers=numbers)
        every = max(1, self.steps // LINES_IN_A_LOG)
        if not self.console.is_terminal and (step % every == 0 or step == self.steps):
            self.console.print(f"{self.name} {step}/{self.steps} {numbers}", soft_wrap=True)


SHOWN = {
    "reward/mean": ("reward", "+.3f"),
    "reverse_kl": ("kl", ".3f"),
    "grad_norm": ("grad", ".2g"),
    "completions/mean_length": ("len", ".0f"),
}
