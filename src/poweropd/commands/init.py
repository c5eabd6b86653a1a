"""`poweropd init`: writes a commented recipe for a file of prompts."""

from pathlib import Path
from typing import Annotated

import typer

Prompts = Annotated[
    str, typer.Argument(help="A file, a folder or glob of files, or a Hub dataset of prompts.")
]
Teacher = Annotated[str, typer.Option(help="The teacher: a directory or a Hub model.")]
Student = Annotated[str, typer.Option(help="The student: a directory or a Hub model.")]
Server = Annotated[str | None, typer.Option(help="Base URL of a vLLM server that has the teacher.")]
Column = Annotated[str | None, typer.Option(help="The column of the prompts (default: found).")]
Split = Annotated[str, typer.Option(help="The split of a Hub dataset.")]
System = Annotated[str | None, typer.Option(help="A system turn before each prompt.")]
Test = Annotated[
    str | None,
    typer.Option(help="A file with the same columns, whose gold answers measure the student."),
]
Out = Annotated[Path, typer.Option(help="The recipe to write; it must not exist.")]


def init(
    prompts: Prompts,
    teacher: Teacher,
    student: Student,
    teacher_server: Server = None,
    column: Column = None,
    split: Split = "train",
    system: System = None,
    test: Test = None,
    out: Out = Path("recipe.yaml"),
) -> None:
    """Looks at your prompts and writes a commented recipe for them, to be read and changed."""
    from poweropd.plan.starter import Models, write_recipe
    from poweropd.plan.survey import survey

    found = survey(prompts, split, column)
    write_recipe(out, found, Models(student, teacher, teacher_server), split, system, test)
    answers = "no gold answers" if found.answer is None else f"gold answers in {found.answer!r}"
    typer.echo(f"{found.source}: {found.count} prompts in {found.column!r}, {answers}")
    typer.echo(f"recipe: {out}\nnext: poweropd plan {out}, then poweropd train {out}")
