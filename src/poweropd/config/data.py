"""The section `data` of a recipe: where the prompts are, and what of a row is one."""

from typing import Annotated

from pydantic import Field

from poweropd.config.fields import Address, MayChange, NonNegativeInt, PositiveInt, Private, Section


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
