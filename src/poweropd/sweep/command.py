"""What `poweropd sweep` does: runs, and then tabulates whatever there is."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from poweropd.errors import RunError, UsageError
from poweropd.runs.files import write_atomically
from poweropd.sweep import cost, results, runner, table
from poweropd.sweep.jobs import Training
from poweropd.sweep.runner import SweepOutcome
from poweropd.terminal import make_console


def run_sweep(
    folder: Path,
    trainings: Sequence[Training],
    parallel: int,
    snr: int,
    best: bool,
    baseline: str,
) -> int:
    """Runs what is not finished and prints the table; returns the exit status.

    Raises RunError, after the table, if a run failed.
    """
    with runner.only_sweep(folder) as lock:
        runner.claim(folder, trainings, {"snr": snr})
        outcome = runner.JobRunner(trainings, parallel, lock).run()
        show_sweep(folder, trainings, outcome, best, baseline)
        return exit_status(folder, outcome, len(trainings))


def check_snr(trainings: Sequence[Training]) -> None:
    """Raises UsageError if the gradients of a training cannot be compared with the exact one."""
    for config in (training.config for training in trainings):
        is_local = config.teacher.place in ("in process", "self")
        if not is_local or config.only_teacher.offload or config.only_teacher.align == "spans":
            raise UsageError(
                "--snr: the exact gradient needs a single teacher in this process, not offloaded "
                "and with align=ids; leave --snr out, or change the recipe's teacher"
            )


def print_trainings(trainings: Sequence[Training], parallel: int) -> None:
    """Prints which runs there are, how far each is, and what is left to pay for them."""
    listed = Table(title=f"{len(trainings)} runs")
    for column in ("cell", "seed", "directory", "state"):
        listed.add_column(column, overflow="fold")
    for training in trainings:
        state = "finished" if training.is_finished() else training.progress()[1]
        listed.add_row(training.cell, str(training.seed), str(training.path), state)
    console = make_console()
    console.print(listed)
    for line in cost.cost_lines(trainings, parallel):
        console.print(line, soft_wrap=True, highlight=False)


def show_sweep(
    folder: Path,
    trainings: Sequence[Training],
    outcome: SweepOutcome,
    best: bool,
    baseline: str,
) -> None:
    """Prints the table and what failed, and writes the table's files."""
    console = make_console()
    rows = results.table_rows(trainings, outcome.failed, best, baseline)
    table.print_table(rows, best, baseline, console)
    for name, why in outcome.failed.items():
        console.print(f"failed: {name}: {why}", soft_wrap=True, markup=False, highlight=False)
    try:
        write_atomically(folder / "sweep.md", table.markdown(rows, best, baseline))
        write_atomically(folder / "sweep.csv", table.as_csv(rows, baseline))
        write_atomically(folder / "sweep.json", table.as_json(rows, best, baseline))
    except OSError as error:
        if not outcome.unfinished:
            raise
        console.print(f"{error.filename}: not written: {error.strerror}", soft_wrap=True)
    else:
        console.print(f"table: {folder}/sweep.md, .csv, .json", soft_wrap=True)


def exit_status(folder: Path, outcome: SweepOutcome, count: int) -> int:
    """Returns 0 or, after a signal n, 128 + n; says then what is left of `count` jobs.

    Raises RunError if the disk is full or a job failed.
    """
    left = f"{len(outcome.unfinished)} of {count} runs are not finished"
    if outcome.interrupted_by is not None:
        make_console(stderr=True).print(
            f"stopped; {left}; the same command goes on", soft_wrap=True, highlight=False
        )
        return 128 + outcome.interrupted_by
    if outcome.disk_full:
        raise RunError(
            f"{folder}: the disk is full: {left}; free some space and run the same command"
        )
    if outcome.failed:
        name, why = next(iter(outcome.failed.items()))
        raise RunError(
            f"{len(outcome.failed)} of {count} runs failed (logs: {folder}/RUN/{runner.LOG}): "
            f"{name}: {why}"
        )
    return 0
