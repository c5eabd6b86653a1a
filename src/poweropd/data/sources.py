"""Rows of data: from files of every format, folders and globs of shards, and Hub datasets.

All readers yield one row after the other, so that the first rows of a large file cost little.
"""

import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from poweropd.embedded import EMBEDDED_PREFIX
from poweropd.errors import UNREADABLE, UsageError, one_line, shown

EMBEDDED_PROBLEMS = 8192
BATCH_ROWS = 1024  # rows that are taken from a Parquet file or a Hub dataset at once
Row = Mapping[str, Any]
# A row, behind the place that an error about it names: "file:line" or "dataset[split] row i".
PlacedRows = Iterator[tuple[str, Row]]
# Words in the names of files and folders that say which split they hold.
SPLIT_WORDS = (
    {"train", "training"},
    {"test", "testing", "eval", "evaluation"},
    {"validation", "valid", "val", "dev", "development"},
)


def placed_rows(
    source: str, split: str = "train", config: str | None = None, revision: str | None = None
) -> PlacedRows:
    """Yields the rows of `source`, each behind its place; raises UsageError at a bad one.

    source: embedded:SPLIT, a file, a folder or glob of files, or a Hub dataset, for which
        `config` and `revision` count. `split` counts for the latter two.
    """
    path = Path(source).expanduser()
    if source.startswith(EMBEDDED_PREFIX):
        yield from _embedded(source.removeprefix(EMBEDDED_PREFIX))
    elif not is_file_name(source):
        yield from hub_rows(source, split, config, revision)
    elif path.is_dir() and (config is not None or _has_card(path)):
        yield from hub_rows(str(path), split, config)  # its card says which files are what
    else:
        for file in _files(source, split):
            yield from file_rows(file)


def is_file_name(source: str) -> bool:
    """Returns whether a source names a file, a folder or a glob, and not a Hub dataset."""
    return (
        _ending(source) in READERS
        or source.startswith((".", "/", "~"))
        or glob.has_magic(source)
        or Path(source).exists()
    )


def check_source(key: str, source: str) -> None:
    """Raises UsageError about `key` for a path at which nothing is; the Hub is not asked."""
    known = source.startswith(EMBEDDED_PREFIX) or glob.has_magic(source)
    a_path = is_file_name(source) or source.count("/") > 1
    if a_path and not known and not Path(source).expanduser().exists():
        raise UsageError(f"{key}: {shown(source)[1:-1]}: no such file or folder")


def _ending(name: str) -> str:
    """Returns the ending of a file's name in lower case, without that of gzip."""
    return Path(name.lower().removesuffix(".gz")).suffix


def read_rows(
    source: str, columns: Sequence[str], split: str = "train", allow_empty: bool = False
) -> list[Row]:
    """Returns the rows of `source`, which hold at least `columns`, each text and not empty.

    Raises UsageError, naming the file and line or row, where something is missing.
    """
    checked = []
    for where, row in placed_rows(source, split):
        for column in columns:
            text_at(where, row, column, allow_empty)
        checked.append(row)
    if not checked:
        raise UsageError(f"{source}: expected at least one row, got none")
    return checked


def value_at(row: Row, column: str) -> object:
    """Returns the value of a column; dots in its name lead into nested mappings, or their JSON.

    Raises KeyError if there is none.
    """
    if column in row:
        return row[column]
    value: object = row
    for name in column.split("."):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except UNREADABLE:
                raise KeyError(column) from None
        if not isinstance(value, Mapping) or name not in value:
            raise KeyError(column)
        value = value[name]
    return value


def find_value(row: Row, column: str) -> object:
    """Returns the value of a column as `value_at` does, or None if there is none."""
    try:
        return value_at(row, column)
    except KeyError:
        return None


def text_at(where: str, row: Row, column: str, allow_empty: bool = False) -> str:
    """Returns the text of a column; raises UsageError, which names the place, for anything else."""
    try:
        value = value_at(row, column)
    except KeyError:
        message = f"expected text in column {column!r}, its columns are {column_names(row)}"
        raise UsageError(f"{where}: {message}") from None
    if not isinstance(value, str) or not (allow_empty or value.strip()):
        raise UsageError(f"{where}: expected text in column {column!r}, got {shown(value)}")
    check_unicode(where, column, value)
    return value


def column_names(row: Row) -> str:
    """Returns the names of a row's columns, nested ones included, as a message lists them."""
    names = list[str]()
    for name, value in row.items():
        nested = [f"{name}.{inner}" for inner in value] if isinstance(value, Mapping) else []
        names += nested or [str(name)]
    return shown(", ".join(names), 300)[1:-1] or "none"


def check_unicode(where: str, column: str, text: str) -> None:
    """Raises UsageError for half a surrogate pair, which no tokenizer can encode."""
    if text.isascii():
        return
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
        work = task.running_totals(problem)
        row = {"id": problem.id, "problem": problem.problem, "answer": problem.answer, "work": work}
        yield f"{EMBEDDED_PREFIX}{split}", row


def _has_card(folder: Path) -> bool:
    """Returns whether a folder is a copy of a Hub dataset whose card lists its files."""
    card = folder / "README.md"
    return card.is_file() and b"data_files:" in card.read_bytes()


def _files(source: str, split: str) -> list[Path]:
    """Returns the files of a folder or glob in the order of their names, or the one file.

    Of a folder whose files are named by splits, only those of `split` are taken.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _ending(p.name) in READERS)
        files = _of_split([p for p in found if not _hidden(p.relative_to(path))], path, split)
        missing = f"no file of {', '.join(READERS)} in this folder"
    elif path.exists() or not glob.has_magic(source):
        return [path]
    else:
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        missing = "no file has such a name"
    if not files:
        raise UsageError(f"{source}: {missing}")
    endings = sorted({_ending(file.name) for file in files})
    if len(endings) > 1:
        raise UsageError(
            f"{source}: expected files of one format, got {', '.join(endings)}: name those that "
            f"are meant, such as {source.rstrip('/')}/*{endings[-1]}"
        )
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Returns the files whose names say that they hold the split; all if no name says so."""
    words = {file: {*re.split(r"[\W_]+", str(file.relative_to(folder)).lower())} for file in files}
    known = set[str]().union(*SPLIT_WORDS)
    if not any(known & own for own in words.values()):
        return files
    meant = next((group for group in SPLIT_WORDS if split in group), {split.lower()})
    found = [file for file in files if meant & words[file]]
    if not found:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:5])
        raise UsageError(
            f"{folder}: expected files of split {split!r}, got {names}; name the split or the files"
        )
    return found


def file_rows(path: Path) -> PlacedRows:
    """Yields the rows of one file by its ending, JSON lines if that is not known."""
    reader = READERS.get(_ending(path.name), json_lines)
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield from reader(str(path), cast(BinaryIO, file))
    except (OSError, EOFError, zlib.error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or one_line(str(error))
        raise UsageError(
            f"{path}: cannot read it ({reason}); expected a file of {', '.join(READERS)}, or one "
            "of these with .gz"
        ) from None


def json_lines(name: str, file: BinaryIO) -> PlacedRows:
    """Yields the object of each line that is not blank; raises UsageError for anything else."""
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            yield f"{name}:{number}", _json_object(f"{name}:{number}", line)


def _json_object(where: str, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except UNREADABLE as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UsageError(f"{where}: expected one JSON object per line: {reason}") from None
    return _checked_object(where, row)


def _checked_object(where: str, row: object) -> Row:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def json_array(name: str, file: BinaryIO) -> PlacedRows:
    """Yields the objects of a JSON array, or those of JSON lines if the file holds no array."""
    start = cast(io.BufferedReader, file).peek(64)[:64]
    if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from json_lines(name, file)
        return
    content = file.read()
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        message = f"{name}:{error.lineno}: expected a JSON array of objects: {error.msg}"
        raise UsageError(message) from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{name}:{line}: expected text in UTF-8: {error}") from None
    except UNREADABLE as error:
        reason = one_line(str(error))
        raise UsageError(f"{name}: expected a JSON array of objects: {reason}") from None
    del content
    for i, row in enumerate(rows):
        yield f"{name}: row {i}", _checked_object(f"{name}: row {i}", row)


def parquet_rows(name: str, file: BinaryIO) -> PlacedRows:
    """Yields the rows of a Parquet file, a batch of them in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    seekable = io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(seekable).iter_batches(BATCH_ROWS):
            for row in batch.to_pylist():
                yield f"{name}: row {number}", row
                number += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = one_line(str(error))
        raise UsageError(f"{name}: cannot read it as a Parquet file: {reason}") from None


def csv_rows(name: str, file: BinaryIO) -> PlacedRows:
    """Yields the rows of a CSV file with a header; a cell that holds chat messages is parsed."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 131,072 characters otherwise
    lines = csv.reader(_decoded_lines(name, file), strict=True)
    header: list[str] | None = None
    while True:
        start = lines.line_num + 1
        try:
            cells = next(lines, None)
        except csv.Error as error:
            raise UsageError(f"{name}:{start}: expected a line of CSV: {error}") from None
        if cells is None:
            return
        if not any(cells):
            continue
        if header is None:
            header = cells
            if len({*header}) < len(header):
                raise UsageError(f"{name}:{start}: expected names of columns that differ in line 1")
        elif len(cells) != len(header):
            raise UsageError(
                f"{name}:{start}: expected {len(header)} cells, one for each column of the first "
                f"line, got {len(cells)}"
            )
        else:
            values = map(_messages_or_text, cells)
            yield f"{name}:{start}", dict(zip(header, values, strict=True))


def _decoded_lines(name: str, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{name}:{number}: expected text in UTF-8: {error}") from None


def _messages_or_text(cell: str) -> object:
    """Returns the chat messages that a cell holds as JSON, or the text of any other cell."""
    if not cell.lstrip().startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except UNREADABLE:
        return cell
    found = isinstance(value, list) and all(
        isinstance(one, dict) and "role" in one for one in value
    )
    return value if found and value else cell


def hub_rows(
    name: str, split: str, config: str | None = None, revision: str | None = None
) -> PlacedRows:
    """Yields the rows of a Hub dataset; raises UsageError if it cannot be loaded."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(str(error)) or type(error).__name__
        raise UsageError(
            f"{name}: neither a file ({', '.join(READERS)}) nor a Hub dataset that can be "
            f"loaded (config {config!r}, split {split!r}, revision {revision!r}): {reason[:250]}"
        ) from None
    number = 0
    for batch in dataset.with_format("arrow").iter(BATCH_ROWS):
        for row in batch.to_pylist():
            yield f"{name}[{split}] row {number}", row
            number += 1


#: What reads a file, by the ending of its name.
READERS: dict[str, Callable[[str, BinaryIO], PlacedRows]] = {
    ".jsonl": json_lines,
    ".json": json_array,
    ".parquet": parquet_rows,
    ".csv": csv_rows,
}
