"""Writes a report again and again while its runs go on."""

from collections.abc import Callable, Sequence
from pathlib import Path

from poweropd.report import page
from poweropd.report.runs import RecordedRun, read_runs
from poweropd.runs.directory import RunDirectory, RunState, run_directories

Known = dict[Path, tuple[RunState, RecordedRun]]


class ReportWriter:
    """The page of some runs, which is written when any of them changed.

    paths: run directories, and folders in which run directories may appear, such as a sweep's.
    every: seconds after which the page loads itself again, until all runs are complete.
    """

    def __init__(self, paths: Sequence[Path], out: Path, png: Path | None, every: float) -> None:
        self.paths, self.out, self.png, self.every = paths, out, png, every
        self.known: Known = {}
        self.complete = self.ended = False

    def update(self) -> bool:
        """Reads what changed and, if anything did, writes the page; returns whether it did."""
        found = run_directories(self.paths)
        states = {path: RunDirectory(path).state() for path in found}
        if states == {path: state for path, (state, _) in self.known.items()}:
            return False
        kept = {p: run for p, (state, run) in self.known.items() if states.get(p) == state}
        runs = read_runs(found, kept)
        self.known = {p: (states[p], run) for p, run in zip(found, runs, strict=True)}
        self.complete = all(run.complete for run in runs)
        self._write()
        return True

    def finish(self) -> None:
        """Writes the page, with what changed, as one that does not load itself again."""
        self.ended = True
        if not self.update():
            self._write()

    def progress(self) -> str:
        """Says how far the runs are."""
        runs = [run for _, run in self.known.values()]
        done = sum(run.complete for run in runs)
        going = [f"{run.name}: step {run.steps}" for run in runs if not run.complete and run.steps]
        return ", ".join([f"{done} of {len(runs)} runs complete", *going[:3]])

    def _write(self) -> None:
        runs = [run for _, run in self.known.values()]
        still = self.complete or self.ended
        page.write_page(runs, self.out, self.png, None if still else self.every)


def watch_runs(
    writer: ReportWriter, say: Callable[[str], None], wait: Callable[[float], None]
) -> None:
    """Keeps a report current until all of its runs are complete.

    wait: sleeps for so many seconds; whatever it raises to end this comes after a last page, which
    no longer loads itself again.
    """
    try:
        while not writer.complete:
            if writer.update():
                say(f"{writer.out}: {writer.progress()}")
            if not writer.complete:
                wait(writer.every)
    finally:
        if not writer.complete and writer.known:
            writer.finish()
