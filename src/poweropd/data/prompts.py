"""Prompts from a Hub dataset, a local JSONL or Parquet file, or the embedded task.

The order of prompts is a pure function of (seed, position), so that a resumed run and any number
of processes see the same prompts at the same step.
"""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poweropd.data.chat import encode_chat
from poweropd.embedded import EMBEDDED_PREFIX
from poweropd.errors import UsageError, shown

if TYPE_CHECKING:  # they take a second to import, and benchmarks need no pydantic
    from transformers import PreTrainedTokenizerBase

    from poweropd.config.sections import DataConfig

logger = logging.getLogger("poweropd")

EMBEDDED_PROBLEMS = 8192
HOLDOUT = -1  # number of the permutation that chooses held-out prompts
FILE_ENDINGS = (".jsonl", ".json", ".parquet")
Row = Mapping[str, Any]
# A row, behind the place that an error about it names: "file:line" or "dataset[split] row i".
PlacedRows = Iterator[tuple[str, Row]]


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt."""

    index: int  # of its row in the data
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    row: Row = field(default_factory=dict)  # the columns of that row
    domain: str = ""  # which of several teachers scores it


def read_rows(
    source: str, columns: Sequence[str], split: str = "train", allow_empty: bool = False
) -> list[Row]:
    """Returns the rows of `source`, which hold at least `columns`, each text and not empty.

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
                got = f"got {shown(value)}" if column in row else f"its columns are {_names(row)}"
                raise UsageError(f"{where}: expected text in column {column!r}, {got}")
            if not value.isascii():
                _check_unicode(where, column, value)
        checked.append(row)
    if not checked:
        raise UsageError(f"{source}: expected at least one row, got none")
    return checked


def check_source(key: str, source: str) -> None:
    """Raises UsageError about `key` for a path at which nothing is; the Hub is not asked."""
    path = Path(source)
    a_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    pattern = any(character in source for character in "*?[")
    known = source.startswith(EMBEDDED_PREFIX) or pattern or path.exists()
    if not known and (a_path or path.suffix in FILE_ENDINGS):
        raise UsageError(f"{key}: {shown(source)[1:-1]}: no such file or folder")


def _names(row: Row) -> str:
    return shown(", ".join(map(str, row)), 300)[1:-1]


def _check_unicode(where: str, column: str, text: str) -> None:
    """Raises UsageError for half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: column {column!r} holds {shown(text[error.start])} at character "
            f"{error.start}, half a surrogate pair: expected valid Unicode text"
        ) from None


def _embedded(split: str) -> PlacedRows:
    from poweropd.embedded import task

    try:
        problems = task.problems(split, EMBEDDED_PROBLEMS)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"data.prompts: {error}") from None
    for problem in problems:
        row = {"id": problem.id, "problem": problem.problem, "answer": problem.answer}
        yield f"{EMBEDDED_PREFIX}{split}", row


def _file(path: Path) -> PlacedRows:
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


def json_lines(path: Path) -> PlacedRows:
    """Yields the object of each line that is not blank; raises UsageError for anything else."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse_line(f"{path}:{number}", line)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read it ({error.strerror}); expected JSON lines"
        ) from None


def _parse_line(where: str, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: expected one JSON object per line: {error}") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def hub_rows(name: str, split: str, config: str | None = None) -> PlacedRows:
    """Yields the rows of a Hub dataset; raises UsageError if it cannot be loaded."""
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


def load_prompts(
    data: "DataConfig",
    tokenizer: "PreTrainedTokenizerBase",
    teacher_tokenizers: Mapping[str, "PreTrainedTokenizerBase"],
    domain_column: str | None = None,
) -> list[Prompt]:
    """Loads all prompts of a recipe's `data` section, tokenized for student and teacher.

    The column `domain_column` holds the name of a prompt's teacher, if there are several.
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
    """Raises UsageError unless every prompt and its longest completion fit both contexts."""
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


def check_ids(
    prompts: Sequence[Prompt], student_vocab: int | None, teacher_vocab: int | None
) -> None:
    """Raises UsageError for a prompt with an id that a model's embedding does not have.

    The sizes are those of the models' embeddings; None stands for one that is not known here.
    """
    for prompt in prompts:
        for who, ids, size in (
            ("student", prompt.prompt_ids, student_vocab),
            ("teacher", prompt.teacher_prompt_ids, teacher_vocab),
        ):
            if size is not None and max(ids, default=0) >= size:
                raise UsageError(
                    f"data.prompts row {prompt.index}: token id {max(ids)} of its prompt is "
                    f"outside the {who}'s embedding of {size} tokens: the tokenizer has tokens "
                    "that the model was never given; resize the model, or drop the row"
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
