"""Runs the trainings of a sweep, each in a process of its own, and says how far they are.

A crash ends one training and no other. SIGINT, SIGTERM and SIGHUP are passed on to the trainings,
which write a checkpoint; the same command goes on from there. A disk that is full ends
the sweep, since every further training would fail on it.
"""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import torch

from poweropd.errors import UsageError
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import write_json
from poweropd.sweep.cells import Training
from poweropd.sweep.progress import SweepProgress

DEFINITION = "runs.json"
LOG = "train.log"
LOCK = ".lock"
POLL_SECONDS = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Out of space, over a quota, over a limit of file size: nothing more can be written here.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PROBE_BYTES = 1 << 20


@dataclass
class SweepOutcome:
    """How a sweep's trainings ended: name -> why, for those that failed."""

    failed: dict[str, str] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    interrupted_by: int | None = None  # signal number
    disk_full: bool = False


def check_snr(trainings: Sequence[Training]) -> None:
    """UsageError where a training's gradients could not be compared with the exact one."""
    for config in (training.config for training in trainings):
        if not config.has_one_local_teacher or config.only_teacher.offload:
            raise UsageError(
                "--snr: the exact gradient needs a single teacher in this process, not offloaded; "
                "leave --snr out, or change the recipe's teacher"
            )


def claim(out: Path, trainings: Sequence[Training], snr: int) -> None:
    """Takes a directory for this sweep, with all run directories, or goes on in it.

    The same sweep may have grown by cells or seeds. Raises UsageError where `out` holds other
    runs, or other configurations under the same names, or something else.
    """
    path = out / DEFINITION
    names = [training.name for training in trainings]
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in found["runs"] if name not in names]
        if missing:
            raise UsageError(
                f"--out: {out} holds another sweep, with {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}: name its cells too, or choose another"
            )
        if found["snr"] != snr:
            raise UsageError(f"--snr: the sweep in {out} was begun with --snr {found['snr']}")
    elif out.exists() and any(p.name != LOCK for p in out.iterdir()):
        raise UsageError(f"--out: {out} exists and holds no sweep; choose another")
    for training in trainings:
        try:
            RunDirectory.open(training.config)
        except UsageError as error:
            raise UsageError(f"--out: {out} holds another sweep: {error}") from None
    write_json(path, {"snr": snr, "runs": names})


@contextmanager
def locked(out: Path) -> Iterator[IO[str]]:
    """Keeps a second sweep out. Trainings inherit the lock: one left alone by a kill holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--out: {out} is in use by another sweep, or by trainings that one left behind"
            ) from None
        yield lock


def run_trainings(
    trainings: Sequence[Training], parallel: int, snr: int, lock: IO[str]
) -> SweepOutcome:
    """Runs what is not finished, `parallel` at a time, and returns how it ended."""
    runner = _Runner([t for t in trainings if not t.is_finished(snr)], parallel, snr, lock)
    with runner.forwarding(), SweepProgress(trainings) as progress:
        try:
            while runner.waiting or runner.active:
                runner.start()
                runner.collect()
                progress.update([training for training, _ in runner.active.values()])
                time.sleep(POLL_SECONDS)
        finally:  # leaves no training behind, whatever went wrong here
            runner.stop()
            for _, process in runner.active.values():
                process.wait()
    runner.outcome.unfinished = [t.name for t in trainings if not t.is_finished(snr)]
    return runner.outcome


class _Runner:
    def __init__(self, todo: list[Training], parallel: int, snr: int, lock: IO[str]) -> None:
        self.waiting, self.parallel, self.snr, self.lock = deque(todo), parallel, snr, lock
        self.active: dict[int, tuple[Training, subprocess.Popen[bytes]]] = {}  # by slot
        self.outcome, self.stopping = SweepOutcome(), False

    def start(self) -> None:
        for slot in range(self.parallel):
            if self.waiting and slot not in self.active:
                training = self.waiting.popleft()
                self.active[slot] = training, self._process(training, slot)

    def _process(self, training: Training, slot: int) -> subprocess.Popen[bytes]:
        run = training.directory
        command = [sys.executable, "-m", "poweropd", "sweep-run", str(run.config_path)]
        with (run.path / LOG).open("ab") as log:
            return subprocess.Popen(
                [*command, "--snr", str(self.snr)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=process_environment(slot, self.parallel),
                pass_fds=[self.lock.fileno()],
                start_new_session=True,  # a Ctrl-C reaches it through us, once
            )

    def collect(self) -> None:
        """Takes note of what ended."""
        for slot, (training, process) in list(self.active.items()):
            if process.poll() is None:
                continue
            del self.active[slot]
            if process.returncode and not self.stopping:
                self.outcome.failed[training.name] = reason(training, process.returncode)
                if disk_is_full(training):
                    self.outcome.disk_full = True
                    self.stop()

    def stop(self) -> None:
        """Starts nothing more and asks the active trainings to write a checkpoint."""
        self.stopping = True
        self.waiting.clear()
        for _, process in self.active.values():
            process.send_signal(signal.SIGTERM)

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            self.outcome.interrupted_by = number
            self.stop()

        # Under nohup, a hang-up is to be ignored.
        kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        previous = {number: signal.signal(number, handle) for number in {*SIGNALS} - kept}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def process_environment(slot: int, parallel: int, gpus: int | None = None) -> dict[str, str]:
    """Environment of a training: its share of the cores and, of several GPUs, its own."""
    cores = len(os.sched_getaffinity(0))
    shared = {"OMP_NUM_THREADS": str(max(1, cores // parallel)), **os.environ}
    gpus = torch.cuda.device_count() if gpus is None else gpus
    if gpus < 2 or parallel == 1:
        return shared
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return {**shared, "CUDA_VISIBLE_DEVICES": visible.split(",")[slot % gpus]}


def reason(training: Training, status: int) -> str:
    """The error that a failed training ended with."""
    lines = _log(training).strip().splitlines() or [""]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"{how}: {said.removeprefix('error: ')}"


def disk_is_full(training: Training) -> bool:
    """Whether a failed training says so or, where even its log could not grow, a probe does."""
    if any(os.strerror(number) in _log(training) for number in FULL):
        return True
    probe = training.directory.path / ".probe"
    try:
        probe.write_bytes(b"0" * PROBE_BYTES)
    except OSError as error:
        return error.errno in FULL
    finally:
        probe.unlink(missing_ok=True)
    return False


def _log(training: Training) -> str:
    """The end of a training's log."""
    path = training.directory.path / LOG
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 2**14))
        return log.read().decode("utf-8", errors="replace")
