"""Prompts: read from a recipe's data, tokenized for both models, checked, split and ordered.

The order of prompts is a pure function of (seed, position), so that a resumed run and any number
of processes see the same prompts at the same step.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from poweropd.data.chat import encode_chat
from poweropd.data.messages import (
    Conversation,
    Tool,
    content_text,
    read_conversation,
    read_system,
    read_tools,
)
from poweropd.data.sources import PlacedRows, Row, column_names, placed_rows, text_at
from poweropd.data.teacher_prompts import NO_ATTEMPT, Attempt, TeacherPrompts
from poweropd.errors import UsageError

if TYPE_CHECKING:  # they take a second to import, and benchmarks need no pydantic
    from transformers import PreTrainedTokenizerBase

    from poweropd.config.data import DataConfig
    from poweropd.config.sections import TrainConfig

logger = logging.getLogger("poweropd")

AUTO = "auto"  # as a column: the first of these that the first row has
AUTO_COLUMNS = ("problem", "prompt", "messages", "question")
HOLDOUT = -1  # number of the permutation that chooses held-out prompts
CHUNK = 1024  # rows that are tokenized at once


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt."""

    index: int  # of its row in the data
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    row: Row = field(default_factory=dict)  # the columns of that row
    domain: str = ""  # which of several teachers scores it


def prompt_column(data: "DataConfig", row: Row, place: str = "data.column") -> str:
    """Returns the column of the prompts, found in a row for `auto`; raises UsageError without."""
    if data.column != AUTO:
        return data.column
    found = next((name for name in AUTO_COLUMNS if name in row), None)
    if found is None:
        raise UsageError(
            f"{place}: data.column=auto looks for {', '.join(AUTO_COLUMNS)}, and the columns are "
            f"{column_names(row)}: set data.column to the one with the prompts"
        )
    return found


class RowReader:
    """Reads what a recipe's `data` section asks for from row after row."""

    def __init__(self, data: "DataConfig", tools: list[Tool] | None = None) -> None:
        self.data, self.tools, self.column = data, tools, ""
        self.teacher_prompts = TeacherPrompts(data)
        self.left_out = 0  # prompts without the assistant's message at their end

    def student_prompt(self, place: str, row: Row) -> Conversation:
        """Returns what the student reads."""
        self.column = self.column or prompt_column(self.data, row, place)
        found = self._prompt(place, row, self.column)
        self.left_out += found.continues and not self.data.continue_assistant
        return found if self.data.continue_assistant else found.cut()

    def teacher_prompt(
        self, place: str, row: Row, own: Conversation, attempt: Attempt = NO_ATTEMPT
    ) -> Conversation:
        """Returns what the teacher reads; `own` is what the student reads.

        `attempt` is the student's completion if `data.feedback` tells the teacher of it.
        """
        if self.data.teacher_column is not None:
            found = self._prompt(place, row, self.data.teacher_column)
            own = found if self.data.continue_assistant else found.cut()
        return self.teacher_prompts.conversation(place, row, own, attempt)

    def _prompt(self, place: str, row: Row, column: str) -> Conversation:
        """Returns the prompt of a column with the row's own system turn and tools."""
        data = self.data
        found = read_conversation(row, column, place)
        turns, tools = found.turns, self.tools
        if data.system_column is not None and not found.has_system:
            system = read_system(row, data.system_column, place)
            turns = [{"role": "system", "content": system}, *turns] if system else turns
        if data.tools_column is not None:
            tools = read_tools(row, data.tools_column, place) or tools
        if data.continue_assistant and found.continues and not content_text(turns[-1]).strip():
            raise UsageError(
                f"{place}: column {column!r}: message {len(found.turns)}: expected text to "
                "continue (data.continue_assistant), got none"
            )
        return Conversation(turns, tools, place)

    def notify(self, count: int) -> None:
        """Tells the user of messages that were left out, of `count` prompts in all."""
        if self.left_out:
            logger.warning(
                "%d of %d prompts end with a message of the assistant, which is left out, so that "
                "the student writes its own; data.continue_assistant=true keeps it as the "
                "beginning of the completion",
                *(self.left_out, count),
            )


def load_prompts(
    data: "DataConfig",
    tokenizer: "PreTrainedTokenizerBase",
    teacher_tokenizers: Mapping[str, "PreTrainedTokenizerBase"],
    domain_column: str | None = None,
    apart: Collection[str] = (),
    tools: list[Tool] | None = None,
) -> list[Prompt]:
    """Loads all prompts of a recipe's `data` section, tokenized for student and teacher.

    The column `domain_column` holds the name of a prompt's teacher, if there are several. Teachers
    read the student's tokens, unless they have a column or, as those `apart`, tokens of their own.
    `tools` are those of prompts without tools of their own.
    """
    rows = placed_rows(data.prompts, data.split, data.config, data.revision)
    reader, prompts = RowReader(data, tools), list[Prompt]()
    for chunk in _chunks(islice(rows, data.limit)):
        domains = [_domain(place, row, domain_column) for place, row in chunk]
        asked = [reader.student_prompt(place, row) for place, row in chunk]
        own = encoded(tokenizer, asked, data)
        other = list(own)
        for name, teacher_tokenizer in teacher_tokenizers.items():
            members = [i for i, domain in enumerate(domains) if domain == name]
            if members and (data.teacher_reads_more or name in apart):
                theirs = [reader.teacher_prompt(*chunk[i], asked[i]) for i in members]
                made = encoded(teacher_tokenizer, theirs, data)
                for i, ids in zip(members, made, strict=True):
                    other[i] = ids
        prompts += [
            Prompt(len(prompts) + i, own[i], other[i], row, domains[i])
            for i, (_, row) in enumerate(chunk)
        ]
    if not prompts:
        raise UsageError(f"{data.prompts}: expected at least one row, got none")
    _check_domains([prompt.domain for prompt in prompts], teacher_tokenizers, domain_column)
    reader.notify(len(prompts))
    return prompts


def _chunks(rows: PlacedRows) -> Iterator[list[tuple[str, Row]]]:
    """Yields lists of at most CHUNK rows: what tokenizing makes beside the ids is dropped soon."""
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _domain(place: str, row: Row, column: str | None) -> str:
    return "" if column is None else text_at(place, row, column)


def encoded(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Conversation], data: "DataConfig"
) -> list[list[int]]:
    """Returns the ids of prompts as a recipe's `data` section has them encoded."""
    return encode_chat(tokenizer, prompts, data.chat, data.system)


def _check_domains(domains: Sequence[str], known: Collection[str], column: str | None) -> None:
    missing = Counter(domain for domain in domains if domain not in known)
    if missing:
        counts = ", ".join(f"{domain!r} ({n} rows)" for domain, n in missing.most_common())
        raise UsageError(
            f"teacher.by: column {column!r} holds {counts}, for which teacher has no section "
            f"(it has {', '.join(known)})"
        )


def check_lengths(
    prompts: Sequence[Prompt],
    student_context: int,
    teacher_context: int,
    max_new_tokens: int,
    source: str = "data.prompts",
) -> None:
    """Raises UsageError unless every prompt and its longest completion fit both contexts.

    `source` is the key of the recipe that names the prompts.
    """
    setting = "rollout" if source == "data.prompts" else "evaluate.divergence"
    for prompt in prompts:
        problem = _excess(prompt, student_context, teacher_context, max_new_tokens, setting)
        if problem is not None:
            raise UsageError(
                f"{source} row {prompt.index}: {problem}; shorten the prompt, lower "
                "max_new_tokens, or set data.filter_longer=true to leave such rows out"
            )


def fits(prompt: Prompt, student_context: int, teacher_context: int, max_new_tokens: int) -> bool:
    """Returns whether a prompt fits both contexts with its longest completion."""
    return _excess(prompt, student_context, teacher_context, max_new_tokens) is None


def filter_notice(kept: int, count: int) -> str:
    """Returns how many prompts `data.filter_longer` dropped; raises UsageError if none is kept."""
    if not kept:
        raise UsageError(
            f"data.filter_longer: all {count} prompts are too long for the models' contexts with "
            "rollout.max_new_tokens: lower it"
        )
    return (
        f"data.filter_longer: dropped {count - kept} of {count} prompts, which are too long for "
        "the models' contexts with rollout.max_new_tokens"
    )


def epochs_notice(train: "TrainConfig", count: int) -> str:
    """Returns how many epochs the steps of a recipe are, of `count` prompts."""
    steps = train.steps_of(count)
    epochs = steps * train.prompts_per_step / count
    return (
        f"{steps} steps of {train.prompts_per_step} prompts are {epochs:.3g} epochs of {count} "
        "prompts"
    )


def _excess(
    prompt: Prompt,
    student_context: int,
    teacher_context: int,
    max_new_tokens: int,
    setting: str = "rollout",
) -> str | None:
    """Returns which context a prompt and its longest completion exceed; None if they fit both."""
    for who, ids, context in (
        ("student", prompt.prompt_ids, student_context),
        ("teacher", prompt.teacher_prompt_ids, teacher_context),
    ):
        if len(ids) + max_new_tokens > context:
            return (
                f"a prompt of {len(ids)} tokens and {setting}.max_new_tokens={max_new_tokens} "
                f"exceed the {who}'s context of {context} tokens"
            )
    return None


def check_ids(
    prompts: Sequence[Prompt],
    student_vocab: int | None,
    teacher_vocab: int | None,
    source: str = "data.prompts",
) -> None:
    """Raises UsageError for a prompt with an id that a model's embedding does not have.

    The sizes are those of the models' embeddings; None stands for one that is not known here.
    `source` is the key of the recipe that names the prompts.
    """
    for prompt in prompts:
        for who, ids, size in (
            ("student", prompt.prompt_ids, student_vocab),
            ("teacher", prompt.teacher_prompt_ids, teacher_vocab),
        ):
            if size is not None and max(ids, default=0) >= size:
                raise UsageError(
                    f"{source} row {prompt.index}: token id {max(ids)} of its prompt is "
                    f"outside the {who}'s embedding of {size} tokens: the tokenizer has tokens "
                    "that the model was never given; resize the model, or drop the row"
                )


def check_shared(
    prompts: Sequence[Prompt],
    unshared: Collection[int],
    tokenizer: "PreTrainedTokenizerBase",
    source: str = "data.prompts",
) -> None:
    """Raises UsageError for a prompt of the student with an id that the models do not share.

    A teacher's prompt of its own column is in the teacher's own tokens.
    """
    for prompt in prompts if unshared else ():
        held = next((i for i in prompt.prompt_ids if i in unshared), None)
        if held is not None:
            raise UsageError(
                f"{source} row {prompt.index}: its prompt holds "
                f"{tokenizer.convert_ids_to_tokens(held)} (id {held}), which is not the same token "
                "to student and teacher: drop the row, or change what writes it (data.chat, the "
                "student's chat template)"
            )


def split_holdout(
    prompts: Sequence[Prompt], count: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Returns the prompts to train on and `count` held-out ones, chosen by the seed.

    Both keep the order of the data. A prompt that reads the same as a held-out one is not trained
    on, which a notice says. Raises UsageError if nothing is left to train on.
    """
    if not count:
        return list(prompts), []
    if count >= len(prompts):
        raise UsageError(
            f"data.holdout: expected fewer than the {len(prompts)} prompts of data.prompts, got "
            f"{count}: none would be left to train on; lower it"
        )
    chosen = {*_permutation(len(prompts), seed, HOLDOUT)[:count]}
    held = [prompt for i, prompt in enumerate(prompts) if i in chosen]
    texts = {(*prompt.prompt_ids,) for prompt in held}
    kept = [prompt for prompt in prompts if (*prompt.prompt_ids,) not in texts]
    copies = len(prompts) - count - len(kept)
    if not kept:
        raise UsageError(
            f"data.holdout: all {copies} prompts beside the {count} held-out ones read the same as "
            "one of them: none is left to train on; lower it, or drop repeated rows"
        )
    if copies:
        logger.warning(
            "data.holdout: %d more prompts read the same as a held-out one and are not trained on",
            copies,
        )
    return kept, held


@dataclass(frozen=True)
class PromptOrder:
    """Says which of `count` rows come at which step: each epoch is a permutation of all rows."""

    count: int
    seed: int
    shuffle: bool = True

    def at_step(self, step: int, prompts_per_step: int) -> list[int]:
        """Returns the row numbers of optimizer step `step`, counted from 0."""
        first = step * prompts_per_step
        positions = range(first, first + prompts_per_step)
        epochs = {p // self.count: self._epoch(p // self.count) for p in positions}
        return [epochs[p // self.count][p % self.count] for p in positions]

    def _epoch(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.count))
        return _permutation(self.count, self.seed, epoch)


def _permutation(count: int, seed: int, number: int) -> list[int]:
    """Returns permutation `number` of the first `count` numbers, one of a sequence for each seed.

    Epochs take those from 0 on.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randperm(count, generator=generator).tolist()
