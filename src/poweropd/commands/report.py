"""`poweropd report`: one page on runs."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
) -> None:
    """Shows and compares runs, finished or not, on one self-contained HTML page."""
    from poweropd.report import page

    written = page.write_report(runs, out, png)
    typer.echo(f"report: {written[0]}")
    if png is not None:
        typer.echo(f"{len(written) - 1} figures: {png}")
