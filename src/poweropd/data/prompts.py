"""Prompts: from a Hub dataset, a local JSONL or Parquet file, or the embedded task.

The order of prompts is a pure function of (seed, position), so that a resumed run and any number
of processes see the same prompts at the same step.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch

from poweropd.embedded import EMBEDDED_PREFIX
from poweropd.errors import UsageError

EMBEDDED_PROBLEMS = 8192
FILE_ENDINGS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt. `index` is its row in the data, `row` that row's columns.

    `domain` is the name of its teacher, where there are several.
    """

    index: int
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    row: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""


def read_rows(
    source: str, columns: Sequence[str], split: str = "train", allow_empty: bool = False
) -> list[dict[str, Any]]:
    """The rows of `source` as dicts that hold at least `columns`, each text and not empty.

    Raises UsageError, naming the file and line or row, where something is missing.
    """
    path = Path(source)
    if source.startswith(EMBEDDED_PREFIX):
        rows = _embedded(source.removeprefix(EMBEDDED_PREFIX))
    elif path.suffix in FILE_ENDINGS or path.exists():
        rows = _file(path)
    else:
        rows = hub_rows(source, split)
    checked = []
    for where, row in rows:
        for column in columns:
            value = row.get(column)
            if not isinstance(value, str) or not (allow_empty or value.strip()):
                got = f"got {value!r}" if column in row else f"its columns are {', '.join(row)}"
                raise UsageError(f"{where}: expected text in column {column!r}, {got}")
        checked.append(row)
    if not checked:
        raise UsageError(f"{source}: expected at least one row, got none")
    return checked


def _embedded(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from poweropd.embedded import task

    try:
        problems = task.problems(split, EMBEDDED_PROBLEMS)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"data.prompts: {error}") from None
    for problem in problems:
        row = {"id": problem.id, "problem": problem.problem, "answer": problem.answer}
        yield f"{EMBEDDED_PREFIX}{split}", row


def _file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix != ".parquet":
        yield from json_lines(path)
        return
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UsageError(f"{path}: cannot read it as a Parquet file: {error}") from None
    yield from ((f"{path}: row {i}", row) for i, row in enumerate(table.to_pylist()))


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line that is not blank; UsageError for anything else."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse_line(f"{path}:{number}", line)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read it ({error.strerror}); expected JSON lines"
        ) from None


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: expected one JSON object per line: {error}") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def hub_rows(
    name: str, split: str, config: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("name[split] row i", row) of a Hub dataset; UsageError where it cannot be loaded."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise UsageError(
            f"{name}: neither a file ({', '.join(FILE_ENDINGS)}) nor a Hub dataset that can be "
            f"loaded (config {config!r}, split {split!r}): {reason[:200]}"
        ) from None
    yield from ((f"{name}[{split}] row {i}", dict(row)) for i, row in enumerate(dataset))


def encode_chat(
    tokenizer: Any, texts: Sequence[str], chat: Mapping[str, Any] | None, system: str | None = None
) -> list[list[int]]:
    """Token ids of one user turn each, up to where the model's turn begins.

    `chat` holds the chat template's own arguments, such as enable_thinking; None means the plain
    text without any template.
    """
    if chat is None and system:
        raise UsageError("a system turn needs the chat template: drop one of the two settings")
    if chat is None:
        return [list(ids) for ids in tokenizer(list(texts))["input_ids"]]
    if not tokenizer.chat_template:
        raise UsageError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; to give it plain text "
            "set data.chat=null in a recipe, --no-chat-template in poweropd eval"
        )
    before = [{"role": "system", "content": system}] if system else []
    turns = [[*before, {"role": "user", "content": text}] for text in texts]
    try:
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False, **chat
        )
    except (TypeError, jinja2.TemplateError) as error:
        raise UsageError(f"{tokenizer.name_or_path}: its chat template fails: {error}") from None
    return [list(ids) for ids in encoded]


def load_prompts(
    data: Any,
    tokenizer: Any,
    teacher_tokenizers: Mapping[str, Any],
    domain_column: str | None = None,
) -> list[Prompt]:
    """All prompts of a recipe's `data` section, tokenized for student and teacher.

    `domain_column` says which of several teachers, by name, a prompt belongs to.
    """
    columns = [data.column, data.teacher_column, domain_column]
    rows = read_rows(data.prompts, [c for c in columns if c is not None], data.split)
    own = encode_chat(tokenizer, [row[data.column] for row in rows], data.chat, data.system)
    domains = ["" if domain_column is None else row[domain_column] for row in rows]
    _check_domains(domains, teacher_tokenizers, domain_column)
    other = list(own)
    for name, teacher_tokenizer in teacher_tokenizers.items():
        members = [i for i, domain in enumerate(domains) if domain == name]
        if data.teacher_column is not None and members:
            texts = [rows[i][data.teacher_column] for i in members]
            encoded = encode_chat(teacher_tokenizer, texts, data.chat, data.system)
            for i, ids in zip(members, encoded, strict=True):
                other[i] = ids
    return [Prompt(i, own[i], other[i], row, domains[i]) for i, row in enumerate(rows)]


def _check_domains(domains: Sequence[str], known: Collection[str], column: str | None) -> None:
    missing = Counter(domain for domain in domains if domain not in known)
    if missing:
        counts = ", ".join(f"{domain!r} ({n} rows)" for domain, n in missing.most_common())
        raise UsageError(
            f"teacher.by: column {column!r} holds {counts}, for which teacher has no section "
            f"(it has {', '.join(known)})"
        )


def check_lengths(
    prompts: Sequence[Prompt], student_context: int, teacher_context: int, max_new_tokens: int
) -> None:
    """Every prompt and its longest completion must fit both models' contexts."""
    for prompt in prompts:
        for who, ids, context in (
            ("student", prompt.prompt_ids, student_context),
            ("teacher", prompt.teacher_prompt_ids, teacher_context),
        ):
            if len(ids) + max_new_tokens > context:
                raise UsageError(
                    f"data.prompts row {prompt.index}: a prompt of {len(ids)} tokens and "
                    f"rollout.max_new_tokens={max_new_tokens} exceed the {who}'s context of "
                    f"{context} tokens; shorten the prompt or lower max_new_tokens"
                )


@dataclass(frozen=True)
class PromptOrder:
    """Which of `count` rows come at which step: a permutation per epoch, every row once in it."""

    count: int
    seed: int
    shuffle: bool = True

    def at_step(self, step: int, prompts_per_step: int) -> list[int]:
        """The row numbers of optimizer step `step` (from 0)."""
        first = step * prompts_per_step
        positions = range(first, first + prompts_per_step)
        epochs = {p // self.count: self._epoch(p // self.count) for p in positions}
        return [epochs[p // self.count][p % self.count] for p in positions]

    def _epoch(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.count))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.count, generator=generator).tolist()
