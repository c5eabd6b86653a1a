"""When a line of progress is due, by time, and how long the rest of some work takes."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from poweropd.terminal import make_console, print_line

Clock = Callable[[], float]
Say = Callable[[str], None]

FIRST_SECONDS = 30.0  # between two lines at first
LONGEST_SECONDS = 300.0
SHARE = 0.1  # of the time since the start, which is between two lines later


class Pace:
    """Tells when a line is due, and estimates the rest of `total` from what was done so far.

    Two lines are `first_seconds` apart at first, a tenth of the time so far later, and never more
    than LONGEST_SECONDS. `done` is what was done before.
    """

    def __init__(
        self,
        total: float,
        done: float = 0,
        first_seconds: float = FIRST_SECONDS,
        clock: Clock = time.monotonic,
    ) -> None:
        self.total, self.done_before = total, done
        self.first_seconds, self.clock = first_seconds, clock
        self.started = clock()
        self.next_line = self.started + first_seconds

    @property
    def seconds(self) -> float:
        """Returns the seconds since the start."""
        return self.clock() - self.started

    def is_due(self) -> bool:
        """Tells whether it is time for a line; the next one is due some time later."""
        if self.clock() < self.next_line:
            return False
        wait = max(self.first_seconds, min(SHARE * self.seconds, LONGEST_SECONDS))
        self.next_line = self.clock() + wait
        return True

    def speed(self, done: float) -> float | None:
        """Returns how much was done in a second since the start; None if it was nothing."""
        new, seconds = done - self.done_before, self.seconds
        return new / seconds if new > 0 and seconds > 0 else None

    def left(self, done: float) -> str:
        """Returns the remaining time at the speed so far, for the end of a sentence."""
        speed = self.speed(done)
        return "" if speed is None or done >= self.total else time_left((self.total - done) / speed)


def silent(text: str) -> None:
    """Shows nothing."""


def time_left(seconds: float) -> str:
    """Returns a remaining time for the end of a sentence."""
    return f", about {timedelta(seconds=round(seconds))} left"


def is_standard_error(path: Path) -> bool:
    """Tells whether what this process writes to its standard error goes into this file."""
    try:
        return os.path.samestat(os.fstat(2), path.stat())
    except OSError:  # no such file, or no standard error
        return False


def bar_of(
    console: Console, width: int, disable: bool = False, transient: bool = False
) -> Progress:
    """Returns a bar for counted work: its name, how much is done and left, and `numbers`."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=width),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=console,
        disable=disable,
        transient=transient,
    )


class WorkProgress:
    """Follows the completions of an evaluation: a bar on a terminal, lines by time in a log file.

    The first line comes at once, the last one at the end. If `say` is given, it gets the lines in
    between, and nothing else is shown. Silent where `enabled` is False.
    """

    def __init__(
        self,
        name: str,
        total: int,
        done: int = 0,
        enabled: bool = True,
        say: Say | None = None,
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.console = console or make_console(stderr=True)
        self.name, self.done, self.total, self.tokens = name, done, total, 0
        self.pace = Pace(total, done, clock=clock)
        self.say = say or self._print
        self.lines = say is not None or (enabled and not self.console.is_terminal)
        self.has_ends = self.lines and say is None
        self.bar = bar_of(self.console, 20, disable=self.lines or not enabled, transient=True)
        self.task = self.bar.add_task(name, total=total, completed=done, numbers="")

    def __enter__(self) -> Self:
        self.bar.start()
        if self.has_ends:
            self.say(f"{self.name}: {self.done} of {self.total} completions")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()
        if self.has_ends and error is None and self.done > self.pace.done_before:
            self.say(f"{self._state()}, {timedelta(seconds=round(self.pace.seconds))} in all")

    def advance(self, completions: int = 1, tokens: int = 0) -> None:
        """Shows that so many more completions are done, of so many tokens in all."""
        self.done, self.tokens = self.done + completions, self.tokens + tokens
        self.bar.update(self.task, completed=self.done, numbers=self._speed())
        if self.lines and self.done < self.total and self.pace.is_due():
            self.say(f"{self._state()}{self.pace.left(self.done)}")

    def _state(self) -> str:
        speed = self._speed()
        return f"{self.name}: {self.done} of {self.total} completions{speed and ', '}{speed}"

    def _speed(self) -> str:
        seconds = self.pace.seconds
        return f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens and seconds else ""

    def _print(self, text: str) -> None:
        print_line(self.console, text)
