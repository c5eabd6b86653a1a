"""`poweropd init`: writes a commented recipe for a file of prompts."""

from pathlib import Path
from typing import Annotated

import typer

from poweropd.errors import UsageError

Prompts = Annotated[
    str, typer.Argument(help="A file, a folder or glob of files, or a Hub dataset of prompts.")
]
Teacher = Annotated[str, typer.Option(help="The teacher: a directory or a Hub model.")]
Student = Annotated[str, typer.Option(help="The student: a directory or a Hub model.")]
Server = Annotated[str | None, typer.Option(help="Base URL of a vLLM server that has the teacher.")]
Column = Annotated[str | None, typer.Option(help="The column of the prompts (default: found).")]
Answer = Annotated[str | None, typer.Option(help="The column of gold answers (default: found).")]
Split = Annotated[str, typer.Option(help="The split of a Hub dataset or folder.")]
System = Annotated[str | None, typer.Option(help="A system turn before each prompt.")]
Test = Annotated[
    str | None,
    typer.Option(help="A file of other problems, whose gold answers measure the student."),
]
Out = Annotated[Path, typer.Option(help="The recipe to write; it must not exist.")]


def init(
    prompts: Prompts,
    teacher: Teacher,
    student: Student,
    teacher_server: Server = None,
    column: Column = None,
    answer: Answer = None,
    split: Split = "train",
    system: System = None,
    test: Test = None,
    out: Out = Path("recipe.yaml"),
) -> None:
    """Look at your prompts and write a commented recipe for them, to be read and changed."""
    if out.exists():
        raise UsageError(f"{out}: it exists already: name another file with --out, or delete it")
    check_places(prompts, student, teacher, teacher_server, test)
    from poweropd.plan.survey import survey

    found = survey(prompts, split, column, None if test else answer)
    tested = None if test is None else survey(test, "test", found.column, answer)
    if tested is not None and tested.answer is None:
        raise UsageError(
            f"--test: {test}: no column of gold answers was found, its columns are "
            f"{', '.join(tested.columns)}: name it with --answer"
        )
    from poweropd.plan.starter import Models, write_recipe  # these load transformers

    write_recipe(out, found, tested, Models(student, teacher, teacher_server), split, system)
    answers = "no gold answers" if found.answer is None else f"gold answers in {found.answer!r}"
    typer.echo(f"{found.source}: {found.count} prompts in {found.column!r}, {answers}")
    if tested is not None:
        typer.echo(f"{test}: {tested.count} problems, graded by {tested.grader}")
    typer.echo(
        f"recipe: {out}\nnext: poweropd plan {out}, poweropd tune {out}, poweropd train {out}"
    )


def check_places(
    prompts: str, student: str, teacher: str, teacher_server: str | None, test: str | None
) -> None:
    """Raises UsageError for a path where nothing is, and for a URL that is none."""
    from poweropd.data.sources import check_source
    from poweropd.models import places
    from poweropd.net import check_url

    check_source("PROMPTS", prompts)
    if test is not None and not Path(test).exists():
        raise UsageError(f"--test: {test}: no such file or folder")
    models = {"--student": student} | ({} if teacher_server else {"--teacher": teacher})
    for option, model in models.items():
        try:
            places.resolve(model)
        except UsageError as error:
            raise UsageError(f"{option}: {error}") from None
    if teacher_server:
        try:
            check_url("--teacher-server", teacher_server)
        except ValueError as error:
            raise UsageError(str(error)) from None
