"""How far a sweep is: a bar for all, one for each active training; lines where it is a log."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from poweropd.sweep.cells import Training

SPEED_SECONDS = 3600.0  # over which the speed is taken: trainings differ


class SweepProgress:
    """Counts optimizer steps, as they appear in the run directories."""

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.console = Console(stderr=True)
        self.steps = {t.name: t.directory.steps_done() for t in trainings}
        self.trainings = {t.name: t for t in trainings}
        self.shown: dict[str, TaskID] = {}
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=SPEED_SECONDS,
        )
        total = sum(t.steps for t in trainings)
        self.whole = self.bar.add_task("all", total=total, completed=sum(self.steps.values()))

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

    def update(self, active: Sequence[Training]) -> None:
        """Shows the trainings that are active now."""
        names = [training.name for training in active]
        for name in [name for name in self.shown if name not in names]:
            self._read(name)
            self.bar.remove_task(self.shown.pop(name))
            self._say(name, f"ended after step {self.steps[name]}")
        for name in names:
            self._read(name)
            if name not in self.shown:
                self.shown[name] = self.bar.add_task(name, total=self.trainings[name].steps)
                self._say(name, f"begins after step {self.steps[name]}")
            self.bar.update(self.shown[name], completed=self.steps[name])
        self.bar.update(self.whole, completed=sum(self.steps.values()))

    def _read(self, name: str) -> None:
        self.steps[name] = self.trainings[name].directory.steps_done()

    def _say(self, name: str, text: str) -> None:
        done = f"{sum(self.steps.values())}/{sum(t.steps for t in self.trainings.values())}"
        self.console.print(f"{name} {text} ({done} of all)", soft_wrap=True, highlight=False)
