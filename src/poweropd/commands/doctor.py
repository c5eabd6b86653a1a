"""`poweropd doctor`: says what is here, and whether the rewards work in other trainers."""

from typing import Annotated

import typer

Trainers = Annotated[
    list[str] | None,
    typer.Argument(help="Trainers that must work, such as verl or trl (default: those installed)."),
]


def doctor(trainers: Trainers = None) -> None:
    """Says what is installed, and tries the rewards inside other trainers; exit 1 if one fails."""
    from poweropd.integrations.doctor import machine_findings, trainer_findings

    wrong = False
    for findings in (machine_findings(), trainer_findings(trainers or [])):
        for finding in findings:
            mark = "!" if finding.is_wrong else " "
            typer.echo(f"{mark} {finding.name:14} {finding.text}")
            wrong = wrong or finding.is_wrong
        typer.echo()
    if wrong:
        raise typer.Exit(1)
