"""The first prompt of a recipe, decoded, as each model reads it."""

from typing import TYPE_CHECKING

from poweropd.data import chat
from poweropd.data.prompts import Prompt, prompt_column
from poweropd.errors import shown

if TYPE_CHECKING:  # they take a second to import
    from transformers import PreTrainedTokenizerBase

    from poweropd.config.data import DataConfig

SHOWN_PROMPT = 600  # characters that are shown of a prompt


def prompt_lines(
    prompt: Prompt,
    tokenizer: "PreTrainedTokenizerBase",
    teacher_tokenizer: "PreTrainedTokenizerBase",
) -> list[str]:
    """Returns a line with the prompt as the student reads it, and one if the teacher's differs."""
    lines = [f"the first prompt: {shown(tokenizer.decode(prompt.prompt_ids), SHOWN_PROMPT)}"]
    if prompt.teacher_prompt_ids != prompt.prompt_ids:
        text = teacher_tokenizer.decode(prompt.teacher_prompt_ids)
        lines.append(f"the teacher's: {shown(text, SHOWN_PROMPT)}")
    return lines


def template_notice(
    prompt: Prompt,
    tokenizer: "PreTrainedTokenizerBase",
    teacher_tokenizer: "PreTrainedTokenizerBase",
    data: "DataConfig",
) -> str | None:
    """Returns a notice if the teacher reads prompts in another template than its own."""
    same = prompt.teacher_prompt_ids == prompt.prompt_ids
    if not same or data.chat is None or not chat.template_differs(tokenizer, teacher_tokenizer):
        return None
    return (
        "the teacher's chat template differs from the student's, and the teacher reads prompts "
        "in the student's: to give it its own set data.teacher_column="
        f"{prompt_column(data, prompt.row)}"
    )
