"""The progress of a run: a bar on a terminal, a line now and then in a log file."""

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from poweropd.runs.metrics import OF_STEPS, StepMetrics
from poweropd.terminal import make_console

LINES_IN_A_LOG = 20  # for a whole run, where the output is not a terminal


class TrainingProgress:
    """Shows the numbers that matter after each step; silent where `enabled` is False."""

    def __init__(self, steps: int, done: int, name: str, enabled: bool = True) -> None:
        self.console = make_console(stderr=True, quiet=not enabled)
        self.steps, self.name = steps, name
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
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

    def update(self, step: int, metrics: StepMetrics) -> None:
        """Shows that `step` steps are done, with the metrics of the last one."""
        shown = [(m.progress, metrics.get(m.key)) for m in OF_STEPS if m.progress]
        numbers = " ".join(f"{p.heading} {p.text(v)}" for p, v in shown if v is not None)
        self.bar.update(self.task, completed=step, numbers=numbers)
        every = max(1, self.steps // LINES_IN_A_LOG)
        if not self.console.is_terminal and (step % every == 0 or step == self.steps):
            self.console.print(f"{self.name} {step}/{self.steps} {numbers}", soft_wrap=True)
