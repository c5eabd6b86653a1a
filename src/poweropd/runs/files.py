"""Files that are whole or absent, and JSON Lines files that may end in the middle of a line."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: An object of a JSON file, as `json` reads it.
JsonObject = dict[str, Any]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file under another name, flushes it to disk, then renames it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Writes a value as an indented JSON file, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yields a new directory to fill, which then replaces `target`, whole or not at all."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    flush(temporary)
    old = target.with_name(f".tmp-old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(folder: Path) -> None:
    """Makes a directory's files and its entries durable."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_jsonl(path: Path) -> list[JsonObject]:
    """Returns the objects of a file's complete lines; [] if there is no such file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def recover_jsonl(path: Path) -> list[JsonObject]:
    """Returns the objects of a file's complete lines and cuts off an incomplete last one."""
    rows = read_jsonl(path)
    if path.exists():
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.truncate(path, complete)
    return rows
