"""Which run directories a report is about; nothing of them is read yet."""

import re
from collections.abc import Sequence
from pathlib import Path

from poweropd.errors import UsageError
from poweropd.runs.directory import RunDirectory


def run_directories(paths: Sequence[Path]) -> list[Path]:
    """Returns the run directories among these paths and, of other folders, those in them.

    Raises UsageError for a path that is neither.
    """
    found = []
    for path in paths:
        if RunDirectory(path).config_path.is_file():
            found.append(path)
            continue
        inside = [file.parent for file in path.glob("*/config.yaml")]
        if not inside:
            problem = "has no config.yaml" if path.exists() else "does not exist"
            raise UsageError(
                "RUN: expected run directories of poweropd train, or a folder of them such as a "
                f"sweep's; {path} {problem}"
            )
        found += sorted(inside, key=_by_numbers)
    return found


def _by_numbers(path: Path) -> list[tuple[float, str]]:
    """Returns a key by which "alpha=50" comes after "alpha=5.0"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", path.name)
    return [(float(part), "") if i % 2 else (0.0, part) for i, part in enumerate(parts)]
