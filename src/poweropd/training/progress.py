"""What training says: a bar on a terminal, lines by time in a log file, all lines in train.log."""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from transformers import PreTrainedTokenizerBase

from poweropd.config import Config
from poweropd.data import preview
from poweropd.data.rollout import Rollout
from poweropd.errors import one_line, shown
from poweropd.runs import summary
from poweropd.runs.directory import RunDirectory
from poweropd.runs.metrics import OF_STEPS, StepMetrics
from poweropd.runs.pace import Clock, Pace, bar_of, is_standard_error, time_left
from poweropd.terminal import make_console, print_line


class LogHandler(logging.Handler):
    """Adds the messages of this package, such as warnings, to the log of a run."""

    def __init__(self, run: RunDirectory) -> None:
        super().__init__()
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        self.run.append_log(record.getMessage())


class TrainingProgress:
    """Says how a run goes. The context is a part of the training, from one `train` to its end.

    `enabled` is for the standard error, `main` for this process as the one that speaks at all.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        enabled: bool = True,
        main: bool = True,
        clock: Clock = time.monotonic,
    ) -> None:
        self.config, self.run, self.main, self.clock = config, run, main, clock
        self.console = make_console(stderr=True, quiet=not (enabled and main))
        self.steps, self.name = config.train.steps, run.path.name
        self.pace: Pace | None = None  # from the end of this process's first step
        self.explained = False  # how lines of evaluations are read
        self.handler = LogHandler(run)
        unseen = self.console.quiet or not self.console.is_terminal
        self.bar = bar_of(self.console, 10, disable=unseen)
        self.task = self.bar.add_task(self.name, total=self.steps, numbers="")

    def __enter__(self) -> Self:
        self.bar.start()
        if self._keeps_log():
            logging.getLogger("poweropd").addHandler(self.handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()
        logging.getLogger("poweropd").removeHandler(self.handler)
        if error is not None and self._keeps_log():
            with suppress(OSError):  # the disk may be full, which is what the error says then
                self.run.append_log(f"ended by {type(error).__name__}: {one_line(str(error))}")

    def begin(self, steps_done: int, opening: Sequence[str]) -> None:
        """Notes where training begins or goes on; `opening` was shown before there was a log."""
        self.bar.update(self.task, completed=steps_done)
        if self.pace is not None or not self._keeps_log():  # one more part in the same process
            return
        going_on = [f"{self.name} goes on at step {steps_done} of {self.steps}"]
        self.run.append_log("\n".join(going_on if steps_done else opening))

    def sampled(
        self, step: int, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Shows the completion of the first prompt of a run; `rollouts` are those of this step."""
        if step or not rollouts:
            return
        first = min(rollouts, key=lambda rollout: rollout.key)
        ids, ending = first.completion_ids, "" if first.stopped else ", truncated"
        text = shown(tokenizer.decode(ids), preview.SHOWN_PROMPT)
        self.say(f"the first completion ({len(ids)} tokens{ending}): {text}")

    def update(self, step: int, metrics: StepMetrics) -> None:
        """Shows that `step` steps are done, with the metrics of the last one."""
        found = [(m.progress, metrics.get(m.key)) for m in OF_STEPS if m.progress]
        phrases = [progress.phrase(value) for progress, value in found if value is not None]
        self.bar.update(self.task, completed=step, numbers=" ".join(phrases))
        left, seconds = "", metrics.get("seconds/step")
        if first := self.pace is None:
            self.pace = Pace(self.steps, step, clock=self.clock)
            if step < self.steps and seconds is not None:
                left = time_left(seconds * (self.steps - step))
        else:
            left = self.pace.left(step)
        if first or step == self.steps or self.pace.is_due():
            numbers = ", ".join(phrases)
            self.say(f"step {step}/{self.steps}: {numbers}{left}", to_terminal=False)

    def evaluated(self, step: int) -> None:
        """Shows the evaluation at this step, beside the one before training."""
        if self.main:
            if not self.explained:
                self.say(summary.legend(self.run, step))
            self.explained = True
            for line in summary.evaluation_lines(self.run, step):
                self.say(f"step {step}: {line}")

    def evaluated_teacher(self) -> None:
        """Shows the evaluation of the teacher itself."""
        if self.main:
            for line in summary.teacher_lines(self.run):
                self.say(f"teacher: {line}")

    def stopped(self, step: int) -> None:
        """Notes in the log that a signal stopped the run after this step."""
        if self._keeps_log():
            self.run.append_log(f"{self.name} stopped by a signal after step {step}")

    def finished(self, step: int) -> None:
        """Shows what the run has reached, where things are, and what can be done with them."""
        if self.main:
            self.say("\n".join(summary.closing_lines(self.run, self.config, step)))

    def say(self, text: str, to_terminal: bool = True) -> None:
        """Prints lines and adds them to the log; a terminal has a bar in place of some."""
        if to_terminal or not self.console.is_terminal:
            print_line(self.console, text)
        if self._keeps_log():
            self.run.append_log(text)

    def _keeps_log(self) -> bool:
        """Tells whether this process adds to the log; not where its standard error does already."""
        return self.main and (self.console.quiet or not is_standard_error(self.run.log_path))
