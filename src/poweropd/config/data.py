"""The section `data` of a recipe: where the prompts are, and what of a row is one."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from poweropd.config.benchmarks import GraderName, check_grader
from poweropd.config.fields import Address, MayChange, NonNegativeInt, PositiveInt, Private, Section


class TeacherTurnConfig(Section):
    """A chat message of the teacher's prompt; a last one of the assistant is gone on with."""

    role: Literal["system", "user", "assistant"]
    """Who says it."""
    content: Annotated[str, Private]
    """Its text: a template over the row's columns, as in `data.teacher_prompt`."""


class FeedbackConfig(Section):
    """A grade of the student's own completion, of which the teacher's prompt may tell."""

    grader: GraderName
    """A grader as in evaluate.grader; a function of yours (row, completion) -> number is one."""
    answer_column: str = "answer"
    """Column with the right answer, for graders that need one."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        check_grader("grader", self.grader)
        return self


class DataConfig(Section):
    """The prompts."""

    prompts: Annotated[str, Address]
    """Prompts: a file, folder or glob of files, a Hub dataset, or embedded:train."""
    split: str = "train"
    """Split of a Hub dataset, or of a folder whose files are named by splits."""
    config: str | None = None
    """Config of a Hub dataset that has several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; null is its main branch."""
    # The prompts themselves must stay: a run keeps their fingerprint.
    column: Annotated[str, MayChange] = "auto"
    """Column with the prompt; auto is the first there is of problem, prompt, messages, question."""
    teacher_column: str | None = None
    """Column with another prompt, for the teacher alone; null gives it the student's."""
    teacher_prompt: Annotated[
        str | Annotated[list[TeacherTurnConfig], Field(min_length=1)] | None, Private
    ] = None
    """Prompt for the teacher alone: text with {columns}, messages of it, a function of the row."""
    teacher_system: Annotated[str | None, Private] = None
    """System turn for the teacher alone, in place of any other."""
    feedback: FeedbackConfig | None = None
    """Gives teacher_prompt the columns completion, grade and feedback; null is none of them."""
    chat: Annotated[dict[str, object] | None, Private] = Field(
        default_factory=lambda: dict[str, object](enable_thinking=False)
    )
    """Arguments of the chat template; null takes the prompts as plain text, without a template."""
    system: Annotated[str | None, Private] = None
    """System turn before each prompt that has none of its own, for student and teacher."""
    system_column: str | None = None
    """Column with a prompt's own system turn."""
    tools_column: str | None = None
    """Column with the tools of a prompt, for the chat template: a list, or its JSON."""
    continue_assistant: bool = False
    """Whether the assistant's message at the end of a prompt is kept, to be continued."""
    limit: PositiveInt | None = None
    """Number of rows that are read, the first ones; null is all."""
    filter_longer: bool = False
    """Whether prompts that are too long for a model's context are left out, and not refused."""
    shuffle: bool = True
    """Whether the prompts are shuffled in every epoch."""
    holdout: NonNegativeInt = 0
    """Number of prompts, chosen by train.seed, that are kept out of training for validation."""

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if self.teacher_prompt is not None and self.teacher_column is not None:
            raise ValueError("teacher_prompt: expected it or teacher_column, got both: drop one")
        if self.feedback is not None and self.teacher_prompt is None:
            raise ValueError(
                "feedback: it needs data.teacher_prompt, which tells the teacher of it with "
                "{completion}, {grade} or {feedback}"
            )
        return self

    @property
    def teacher_reads_more(self) -> bool:
        """Returns whether the teacher reads anything else than the student does."""
        own = (self.teacher_column, self.teacher_prompt, self.teacher_system)
        return any(one is not None for one in own)
