"""Runs the jobs of a sweep, each in a process of its own, and says how far they are.

A crash ends one job and no other. SIGINT, SIGTERM and SIGHUP are passed on to the trainings, which
write a checkpoint; the same command goes on from there. A disk that is full ends the sweep, since
every further job would fail on it.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from poweropd.errors import RunError, UsageError
from poweropd.runs.directory import LOG, RunDirectory
from poweropd.runs.files import locked, read_json, write_atomically
from poweropd.runs.pace import FIRST_SECONDS
from poweropd.sweep.jobs import Job, Training
from poweropd.sweep.progress import SweepProgress

DEFINITION = "runs.json"
LOCK = ".lock"
POLL_SECONDS = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Out of space, over a quota, over a limit of file size: nothing more can be written here.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PROBE_BYTES = 1 << 20


@dataclass
class SweepOutcome:
    """How the jobs of a sweep ended."""

    failed: dict[str, str] = field(default_factory=dict)  # name -> why
    unfinished: list[str] = field(default_factory=list)
    interrupted_by: int | None = None  # signal number
    disk_full: bool = False


def claim(
    out: Path,
    trainings: Sequence[Training],
    options: Mapping[str, int],
    among_others: bool = False,
) -> None:
    """Takes a directory for a sweep, with all its run directories, or goes on in it.

    The same sweep may have grown by cells or seeds. `options` are those of the command line that
    must stay the same and that no run's configuration shows. `among_others`: runs that are not
    named may be there, too. Raises UsageError if `out` holds other runs, or other configurations
    under the same names, or something else.
    """
    path = out / DEFINITION
    names, missing = [training.name for training in trainings], list[str]()
    if path.exists():
        found = read_json(path)
        if not isinstance(found.get("runs"), list) or not found.keys() >= options.keys():
            raise RunError(f"{path}: damaged; restore it, or choose another directory")
        missing = [name for name in found["runs"] if name not in names]
        if missing and not among_others:
            raise UsageError(
                f"--out: {out} holds another sweep, with {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}: name its cells too, or choose another"
            )
        for key, value in options.items():
            if found[key] != value:
                raise UsageError(f"--{key}: the sweep in {out} was begun with --{key} {found[key]}")
    elif any(not file.name.startswith(".") for file in out.iterdir()):
        raise UsageError(f"--out: {out} exists and holds no sweep; choose another")
    else:
        _define(path, options, names)  # a kill before the last run directory is made
    for training in trainings:
        try:
            RunDirectory.open(training.config)
        except UsageError as error:
            raise UsageError(f"--out: {out} holds another sweep: {error}") from None
    _define(path, options, [*names, *missing])


def _define(path: Path, options: Mapping[str, int], names: Sequence[str]) -> None:
    write_atomically(path, json.dumps({**options, "runs": names}, indent=2) + "\n")


def only_sweep(out: Path) -> AbstractContextManager[IO[str]]:
    """Keeps a second sweep out; trainings inherit the lock, so one that a kill left alone holds it.

    Raises UsageError if the directory is in use.
    """
    return locked(
        out / LOCK, f"--out: {out} is in use by another sweep, or by trainings that one left behind"
    )


@dataclass
class JobRunner:
    """Runs jobs, each in a process of its own, `parallel` at a time.

    lock: the processes inherit it. threads: those of each job; its share of the cores if None.
    first_seconds: between two lines of a log that say how far the jobs are, at first.
    """

    jobs: Sequence[Job]
    parallel: int
    lock: IO[str]
    threads: int | None = None
    first_seconds: float = FIRST_SECONDS

    def __post_init__(self) -> None:
        self.waiting = deque(job for job in self.jobs if not job.is_finished())
        self.active: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}  # by slot
        self.progress = SweepProgress(self.jobs, self.first_seconds)
        self.outcome, self.stopping = SweepOutcome(), False

    def run(self) -> SweepOutcome:
        """Runs what is not finished and returns how it ended."""
        count = f"{len(self.waiting)} of {len(self.jobs)} jobs are left, {self.parallel} at a time"
        self.progress.say(f"{count}; each writes its output to {LOG} in its directory")
        with self.progress.bars, received_signals() as received:
            try:
                while self.waiting or self.active:
                    if received:
                        self.outcome.interrupted_by = received[-1]
                        received.clear()  # make and the terminal may both send one
                        self._stop()
                    self._start()
                    self._collect()
                    self.progress.update([job for job, _ in self.active.values()])
                    time.sleep(POLL_SECONDS)
            finally:  # leaves no process behind, whatever went wrong here
                self._stop()
                for _, process in self.active.values():
                    process.wait()
                    end_group(process)
        self.outcome.unfinished = [job.name for job in self.jobs if not job.is_finished()]
        return self.outcome

    def _start(self) -> None:
        """Starts waiting jobs in all free slots."""
        for slot in range(self.parallel):
            if not self.waiting or slot in self.active:
                continue
            job = self.waiting.popleft()
            job.path.mkdir(parents=True, exist_ok=True)
            with (job.path / LOG).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "poweropd", *job.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=process_environment(slot, self.parallel, self.threads),
                    pass_fds=[self.lock.fileno()],
                    start_new_session=True,  # a Ctrl-C reaches it through us, once
                )
            self.active[slot] = job, process

    def _collect(self) -> None:
        """Takes note of what ended."""
        for slot, (job, process) in list(self.active.items()):
            if process.poll() is None:
                continue
            end_group(process)
            del self.active[slot]
            if process.returncode and not self.stopping:
                self.outcome.failed[job.name] = why = reason(job.path, process.returncode)
                self.progress.say(f"{job.name} failed: {why}")
                if disk_is_full(job.path):
                    self.outcome.disk_full = True
                    self._stop()

    def _stop(self) -> None:
        """Starts nothing more and asks the active trainings to write a checkpoint."""
        self.stopping = True
        self.waiting.clear()
        for _, process in self.active.values():
            process.send_signal(signal.SIGTERM)


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collects signals that ask for an end; a hang-up is left out if it is ignored, as by nohup."""
    received: list[int] = []
    ignored = {number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in {*SIGNALS} - (ignored & {signal.SIGHUP})
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills what a process that has ended left behind, such as the workers of its grader."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it began a session, so its group has its number


def process_environment(
    slot: int, parallel: int, threads: int | None = None, gpus: int | None = None
) -> dict[str, str]:
    """Returns the environment of a job: its threads and, of several GPUs, its own.

    Without `threads`, OMP_NUM_THREADS is kept or, if there is none, is the job's share of the
    cores. `gpus`: how many there are; torch is asked if None.
    """
    share = max(1, len(os.sched_getaffinity(0)) // parallel)
    shared = {"OMP_NUM_THREADS": str(share), **os.environ}
    if threads is not None:
        shared["OMP_NUM_THREADS"] = str(threads)
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    if gpus < 2 or parallel == 1:
        return shared
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return {**shared, "CUDA_VISIBLE_DEVICES": visible.split(",")[slot % gpus]}


def reason(path: Path, status: int) -> str:
    """Returns the error that a failed job ended with, by the log in its directory."""
    lines = _log(path).strip().splitlines() or [""]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"{how}: {said.removeprefix('error: ')}"


def disk_is_full(path: Path) -> bool:
    """Returns whether a failed job says so or, if even its log could not grow, a probe does."""
    if any(os.strerror(number) in _log(path) for number in FULL):
        return True
    probe = path / ".probe"
    try:
        probe.write_bytes(b"0" * PROBE_BYTES)
    except OSError as error:
        return error.errno in FULL
    finally:
        probe.unlink(missing_ok=True)
    return False


def _log(path: Path) -> str:
    """Returns the end of the log in a job's directory."""
    path = path / LOG
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 2**14))
        return log.read().decode("utf-8", errors="replace")
