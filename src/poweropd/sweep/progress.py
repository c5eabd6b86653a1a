"""How far a sweep is: a bar for all, one for each active job; lines where it is a log."""

from collections.abc import Sequence

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from poweropd.runs.pace import FIRST_SECONDS, Pace
from poweropd.sweep.jobs import Job
from poweropd.terminal import make_console, print_line


class SweepProgress:
    """Follows jobs by the files that they write; in a log, by lines `first_seconds` apart or more.

    `bars` is the context in which it is shown.
    """

    def __init__(self, jobs: Sequence[Job], first_seconds: float = FIRST_SECONDS) -> None:
        self.console = make_console(stderr=True)
        self.done = {job.name: job.progress()[0] for job in jobs}
        total = sum(job.work for job in jobs)
        self.pace = Pace(total, sum(self.done.values()), first_seconds)
        name = TextColumn("{task.description}", markup=False)
        columns = name, BarColumn(bar_width=20), TaskProgressColumn()
        self.bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.whole = self.bars.add_task("all", total=total)
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
        left = self.pace.left(done)
        self.bars.update(self.whole, completed=done, description=f"all{left}")
        if not self.console.is_terminal and self.pace.is_due():
            text = "; ".join(f"{job.name} {state}" for job, state in states.items())
            self.say(f"{done / self.pace.total:.0%} done{left}: {text}")

    def say(self, text: str) -> None:
        """Prints a line, above the bars where there are any."""
        print_line(self.console, text)
