"""Files that are whole or absent, and JSON Lines files that may end in the middle of a line."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from poweropd.errors import UNREADABLE, RunError, UsageError

#: An object of a JSON file, as `json` reads it.
JsonObject = dict[str, Any]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file under another name, flushes it to disk, then renames it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # what a kill left, or a link that somebody put there
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(os.open(temporary, flags, 0o666), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Writes a value as an indented JSON file, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def locked(path: Path, message: str) -> Iterator[IO[str]]:
    """Holds a lock file while the block runs; raises UsageError if another process holds it.

    The lock goes with the process, so a kill does not leave it behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(message) from None
        yield lock


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yields a new directory to fill, which then replaces `target`, whole or not at all."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except SafetensorError as error:  # which is how a full disk is told there
        raise RunError(f"{target}: cannot be written: {error}: free some space") from error
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


def read_json(path: Path, notes: list[str] | None = None) -> JsonObject:
    """Returns the object of a JSON file; {} if there is no such file.

    A damaged file raises RunError or, if `notes` is given, is left out and named in that list.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, TypeError, *UNREADABLE) as error:
        if notes is None:
            raise RunError(f"{path}: cannot be read ({error})") from None
        notes.append(f"{path.name}: cannot be read ({type(error).__name__})")
        return {}


def read_jsonl(path: Path, notes: list[str] | None = None) -> list[JsonObject]:
    """Returns the objects of a file's complete lines; [] if there is no such file.

    A damaged line raises RunError or, if `notes` is given, is left out and counted in that list.
    """
    *lines, cut = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows, left_out = list[JsonObject](), 1 if cut else 0
    for number, line in enumerate(lines, 1):
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (TypeError, *UNREADABLE) as error:
            if notes is None:
                raise RunError(f"{path}:{number}: damaged ({error})") from None
            left_out += 1
    if left_out and notes is not None:
        count = f"{left_out} line{'s' * (left_out > 1)}"
        notes.append(f"{path.name}: {count} cut short or damaged, left out")
    return rows


def recover_jsonl(path: Path) -> list[JsonObject]:
    """Returns the objects of a file's complete lines and cuts off an incomplete last one."""
    rows = read_jsonl(path)
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return rows
