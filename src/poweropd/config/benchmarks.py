"""A benchmark that a recipe describes, and the names of graders in a recipe."""

import re
from typing import Annotated, Self

from pydantic import Discriminator, Tag, model_validator

from poweropd.config.fields import Address, PositiveInt, Private, Section, one_of
from poweropd.errors import shown
from poweropd.grading.graders import GRADERS, name_problem

GraderName = Annotated[str, one_of(GRADERS, custom=True)]
_FILE_NAME = re.compile(r"\w[\w.-]*")  # completions are kept in files that are called so


def check_grader(key: str, named: str | None) -> None:
    """Raises ValueError about `key` if a text names no grader; nothing is imported."""
    problem = None if named is None else name_problem(named)
    if problem is not None:
        raise ValueError(f"{key}: {problem}, got {shown(named)}")


class BenchmarkConfig(Section):
    """A benchmark that is described: a known one asked in another way, or data of one's own."""

    name: str | None = None
    """Its name in results; without file and dataset, that of a known benchmark."""
    file: Annotated[str | None, Address] = None
    """A file, folder or glob of files with problems."""
    dataset: Annotated[str | None, Address] = None
    """A Hub dataset with problems."""
    config: str | None = None
    """Config of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of the dataset; null is its main branch."""
    split: str | None = None
    """Split of the dataset or folder; null is that of the known benchmark, else test."""
    problem: str | None = None
    """Column with the problem; null is that of the known benchmark, else problem."""
    answer: str | None = None
    """Column with the gold answer; null is that of the known benchmark, else answer."""
    instruction: Annotated[str | None, Private] = None
    """Text appended to each problem, after a line break."""
    grader: GraderName | None = None
    """How its completions are graded; null is evaluate.grader."""
    n: PositiveInt | None = None
    """Completions of each problem; null is evaluate.n."""
    limit: PositiveInt | None = None
    """Problems, the first ones; null is evaluate.limit."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        check_grader("grader", self.grader)
        if self.file is not None and self.dataset is not None:
            raise ValueError("dataset: expected a file or a dataset, got both")
        if self.file is None and self.dataset is None and self.name is None:
            raise ValueError("name: expected a name, a file or a dataset, got none of them")
        if self.name is not None and not _FILE_NAME.fullmatch(self.name):
            raise ValueError(
                f"name: expected letters, digits, dots and dashes, got {shown(self.name)}; a path "
                "goes into file, a Hub dataset into dataset"
            )
        return self


def _how_written(benchmark: object) -> str:
    return "(name)" if isinstance(benchmark, str) else "(section)"


AnyBenchmark = Annotated[
    Annotated[str, Tag("(name)")] | Annotated[BenchmarkConfig, Tag("(section)")],
    Discriminator(_how_written),
]
