"""How far a sweep is: a bar for all, one for each active job; lines where it is a log."""

import time
from collections.abc import Sequence
from datetime import timedelta

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from poweropd.sweep.jobs import Job
from poweropd.terminal import make_console


class SweepProgress:
    """Follows jobs by the files that they write; in a log, a line every `line_seconds`.

    `bars` is the context in which it is shown.
    """

    def __init__(self, jobs: Sequence[Job], line_seconds: float) -> None:
        self.console = make_console(stderr=True)
        self.done = {job.name: job.progress()[0] for job in jobs}
        self.total, self.done_before = sum(job.work for job in jobs), sum(self.done.values())
        self.started, self.line_seconds = time.monotonic(), line_seconds
        self.next_line = self.started + line_seconds
        name = TextColumn("{task.description}", markup=False)
        columns = name, BarColumn(bar_width=20), TaskProgressColumn()
        self.bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.whole = self.bars.add_task("all", total=self.total)
        self.shown: dict[Job, TaskID] = {}

    def update(self, active: Sequence[Job]) -> None:
        """Shows the jobs that are active now, and says which began and which ended."""
        states = {}
        for job in [*active, *(job for job in self.shown if job not in active)]:
            self.done[job.name], states[job] = job.progress()
        for job in [job for job in self.shown if job not in active]:
            self.bars.remove_task(self.shown.pop(job))
            self.say(f"{job.name} ended: {states.pop(job)}")
        for job, state in states.items():
            if job not in self.shown:
                self.shown[job] = self.bars.add_task("", total=job.work or None)
                self.say(f"{job.name} begins: {state}")
            text = f"{job.name} {state}"
            self.bars.update(self.shown[job], completed=self.done[job.name], description=text)
        done = sum(self.done.values())
        left = self._left(done)
        self.bars.update(self.whole, completed=done, description=f"all{left}")
        if not self.console.is_terminal and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + self.line_seconds
            text = "; ".join(f"{job.name} {state}" for job, state in states.items())
            self.say(f"{done / self.total:.0%} done{left}: {text}")

    def say(self, text: str) -> None:
        """Prints a line, above the bars where there are any."""
        self.console.print(text, soft_wrap=True, highlight=False)

    def _left(self, done: int) -> str:
        """Returns the remaining time at the speed so far, for a sentence."""
        if done == self.done_before:
            return ""
        speed = (done - self.done_before) / (time.monotonic() - self.started)
        return f", about {timedelta(seconds=round((self.total - done) / speed))} left"
