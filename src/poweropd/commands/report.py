"""`poweropd report`: one page on runs."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, or folders such as a sweep's."),
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep the page current until all runs are complete.")
    ] = False,
    every: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Between two looks of --watch.")
    ] = 30,
) -> None:
    """Shows and compares runs, finished or not, on one self-contained HTML page."""
    from poweropd.runs.directory import run_directories

    run_directories(runs)
    from poweropd.report import page

    if watch:
        _watch(runs, out, png, every)
        return
    written = page.write_report(runs, out, png)
    typer.echo(f"report: {written[0]}")
    if png is not None:
        typer.echo(f"{len(written) - 1} figures: {png}")


def _watch(runs: list[Path], out: Path, png: Path | None, every: float) -> None:
    """Watches until the runs are complete or a signal ends it."""
    from poweropd.report import watch

    def end(number: int, frame: FrameType | None) -> None:
        raise typer.Exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    typer.echo(f"open {out} in a browser; Ctrl-C ends the watch, not the runs")
    writer = watch.ReportWriter(runs, out, png, every)
    watch.watch_runs(writer, typer.echo, time.sleep)
    typer.echo(f"report: {out}")
