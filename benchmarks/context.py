"""What memory one update of a long completion takes: ours beside the usual implementations.

    python benchmarks/context.py --vocabularies 32768,151936,262144 --tokens 8192,16384,32768 \
        --paths ours,ours-full,ours-checkpointed,naive,trl-full --json context.json

One completion is one micro-batch, of models that are 128 wide and have 2 layers, so that the bodies
do not hide the heads. Every cell is the first update of a process of its own, and its peak is above
what the process held before. A process may take --limit gigabytes, after which its cell is empty.
The line through the peaks of a row says what a further token takes, and how many fit in the limit;
no longer completion than those in the table was run.

The trl paths need `pip install 'trl>=1.16'` and are skipped, with the reason, where it is absent.
"""

import argparse
import json
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import CUDA, Geometry, Memory, Pair, apart, machine, print_table
from scaling import NARROW, line_through, without_holes
from turns import Unavailable
from update import PATHS, Update

LONGER = "not tried, as a shorter one did not run"
Row = dict[str, Any]


def ours_checkpointed(pair: Pair) -> Update:
    """Ours with `model.gradient_checkpointing`."""
    pair.student.model.gradient_checkpointing_enable({"use_reentrant": False})
    pair.student.train()
    return PATHS["ours"](pair)


ALL_PATHS: dict[str, Callable[[Pair], Update]] = PATHS | {"ours-checkpointed": ours_checkpointed}
DEFAULT_PATHS = "ours,ours-full,ours-checkpointed,naive,trl-logprob,trl-full"


def long(base: Geometry, vocab: int, tokens: int) -> Geometry:
    """A step of one completion of so many tokens, which is one micro-batch."""
    return replace(base, vocab=vocab, batch=1, completion=tokens, max_tokens=2**30)


def peak(path: str, geometry: Geometry, limit: float) -> int | str:
    """Bytes above the start of one first update, or why there are none.

    On a CPU this process may not take more than `limit` gigabytes from now on.
    """
    if not CUDA:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9), -1))
    try:
        pair = Pair.build(geometry, "fixed")
        update = ALL_PATHS[path](pair)
        memory = Memory()
        update()
        return memory.peak_bytes()
    except Unavailable as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:  # a CPU's allocator raises no OutOfMemoryError
        if "memory" not in str(error):
            raise
        return "out of memory" if CUDA else f"more than {limit:g} GB"


def row_of(
    path: str, vocab: int, tokens: Sequence[int], limit: float, threads: int
) -> tuple[Row, dict[int, str]]:
    """The peaks of one path at one vocabulary, and the reasons for those that are missing."""
    row: Row = {"path": path, "V": vocab}
    found: dict[int, int] = {}
    missing: dict[int, str] = {}
    for count in sorted(tokens):
        geometry = long(NARROW, vocab, count)
        # What does not run at one length does not run at a longer one.
        cell = apart(threads, peak, path, geometry, limit) if not missing else LONGER
        if isinstance(cell, int):
            found[count] = cell
        else:
            missing[count] = cell
        row[f"{count} tokens, GB"] = f"{cell / 1e9:.2f}" if isinstance(cell, int) else "-"
    row |= {"kB / token": "-", f"tokens in {limit:g} GB": "-"}
    if len(found) > 1:
        slope, start = line_through([*found], [*found.values()])
        row["kB / token"] = f"{slope / 1e3:.1f}"
        row[f"tokens in {limit:g} GB"] = f"{int((limit * 1e9 - start) / slope):,}"
    return row, missing


def numbers(text: str) -> list[int]:
    """Reads numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabularies", type=numbers, default=[32768, 151936, 262144])
    parser.add_argument("--tokens", type=numbers, default=[8192, 16384, 32768])
    parser.add_argument("--paths", default=DEFAULT_PATHS)
    parser.add_argument("--limit", type=float, default=20.0, help="gigabytes of a process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.paths = arguments.paths.split(",")
    if unknown := {*arguments.paths} - {*ALL_PATHS}:
        parser.error(f"--paths: expected some of {','.join(ALL_PATHS)}, got {min(unknown)!r}")
    return arguments


@without_holes()
def main() -> None:
    arguments = parse()
    print(f"{machine()}, {arguments.threads} threads\n")
    rows, reasons = [], {}
    for vocab in arguments.vocabularies:
        for path in arguments.paths:
            row, missing = row_of(path, vocab, arguments.tokens, arguments.limit, arguments.threads)
            rows.append(row)
            reasons |= {f"{path}, V = {vocab}, {n} tokens": why for n, why in missing.items()}
            print(" ".join(f"{key} {value};" for key, value in row.items()), flush=True)
    print()
    print_table(list(rows[0]), [list(map(str, row.values())) for row in rows])
    for where, why in reasons.items():
        print(f"{where}: {why}")
    if arguments.json:
        found = {"machine": machine(), "rows": rows, "missing": reasons}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
