"""How far a sweep is: a bar for all, one for each active job; lines where it is a log."""

import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from poweropd.sweep.training import Job


class SweepProgress:
    """Follows jobs by the files that they write; in a log, a line every `line_seconds`."""

    def __init__(self, jobs: Sequence[Job], line_seconds: float) -> None:
        self.console = Console(stderr=True)
        self.jobs = {job.name: job for job in jobs}
        self.done = {job.name: job.work_done() for job in jobs}
        self.total, self.done_before = sum(job.work for job in jobs), sum(self.done.values())
        self.started, self.line_seconds = time.monotonic(), line_seconds
        self.next_line = self.started + line_seconds
        self.shown: dict[str, TaskID] = {}
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.whole = self.bar.add_task("all", total=self.total, completed=self.done_before)

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

    def update(self, active: Sequence[Job]) -> None:
        """Shows the jobs that are active now, and says which began and which ended."""
        names = [job.name for job in active]
        for name in [name for name in self.shown if name not in names]:
            self.done[name] = self.jobs[name].work_done()
            self.bar.remove_task(self.shown.pop(name))
            self.say(f"{name} ended: {self.jobs[name].state()}")
        for job in active:
            self.done[job.name] = job.work_done()
            if job.name not in self.shown:
                self.shown[job.name] = self.bar.add_task(job.name, total=job.work or None)
                self.say(f"{job.name} begins: {job.state()}")
            text = f"{job.name}: {job.state()}"
            self.bar.update(self.shown[job.name], completed=self.done[job.name], description=text)
        done = sum(self.done.values())
        self.bar.update(self.whole, completed=done, description=f"all{self._left(done)}")
        if not self.console.is_terminal and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + self.line_seconds
            states = "; ".join(f"{job.name} {job.state()}" for job in active)
            self.say(f"{done / self.total:.0%} done{self._left(done)}: {states}")

    def say(self, text: str) -> None:
        """Prints a line, above the bars where there are any."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _left(self, done: int) -> str:
        """Returns the remaining time at the speed so far, for a sentence."""
        if done == self.done_before:
            return ""
        speed = (done - self.done_before) / (time.monotonic() - self.started)
        return f", about {timedelta(seconds=round((self.total - done) / speed))} left"
