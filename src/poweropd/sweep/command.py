"""What `poweropd sweep` does: runs, and then tabulates whatever there is."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from poweropd.errors import RunError
from poweropd.runs.files import write_atomically
from poweropd.sweep import results, runner, table
from poweropd.sweep.cells import Training
from poweropd.sweep.runner import SweepOutcome


def run_sweep(
    folder: Path, trainings: Sequence[Training], parallel: int, snr: int, best: bool
) -> None:
    """Raises RunError, after the table, where a run failed; typer.Exit where it was stopped."""
    with runner.locked(folder) as lock:
        runner.claim(folder, trainings, snr)
        outcome = runner.run_trainings(trainings, parallel, snr, lock)
        _report(folder, trainings, snr, outcome, best)


def print_trainings(trainings: Sequence[Training], snr: int) -> None:
    table = Table(title=f"{len(trainings)} runs")
    for column in ("cell", "seed", "directory", "steps done"):
        table.add_column(column, overflow="fold")
    for training in trainings:
        state = "finished" if training.is_finished(snr) else training.directory.steps_done()
        table.add_row(
            training.cell,
            str(training.seed),
            str(training.directory.path),
            f"{state} of {training.steps}" if isinstance(state, int) else state,
        )
    Console().print(table)


def _report(
    folder: Path,
    trainings: Sequence[Training],
    snr: int,
    outcome: SweepOutcome,
    best: bool,
) -> None:
    """Prints the table, writes its files, and raises where the sweep is not whole."""
    console = Console()
    rows = results.table_rows(trainings, snr, outcome.failed, best)
    table.print_table(rows, best, console)
    for name, why in outcome.failed.items():
        console.print(f"failed: {name}: {why}", soft_wrap=True, markup=False, highlight=False)
    problem = _problem(folder, outcome, len(trainings))
    try:
        write_atomically(folder / "sweep.md", table.markdown(rows, best))
        write_atomically(folder / "sweep.csv", table.as_csv(rows))
        write_atomically(folder / "sweep.json", table.as_json(rows, best))
    except OSError as error:
        if problem is None:
            raise
        console.print(f"{error.filename}: not written: {error.strerror}", soft_wrap=True)
    else:
        console.print(f"table: {folder}/sweep.md, .csv, .json", soft_wrap=True)
    if outcome.interrupted_by is not None:
        typer.echo(f"{problem}; the same command goes on", err=True)
        raise typer.Exit(128 + outcome.interrupted_by)
    if problem is not None:
        raise RunError(problem)


def _problem(folder: Path, outcome: SweepOutcome, count: int) -> str | None:
    left = f"{len(outcome.unfinished)} of {count} runs are not finished"
    if outcome.interrupted_by is not None:
        return f"stopped; {left}"
    if outcome.disk_full:
        return f"{folder}: the disk is full: {left}; free some space and run the same command"
    if outcome.failed:
        return f"{len(outcome.failed)} of {count} runs failed (logs: {folder}/RUN/train.log)"
    return None
