"""What benchmarks of several implementations share: paths that take turns, each in its own process.

A path that cannot run here raises `Unavailable`; it is left out, and the reason is said.
"""

import argparse
import importlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import CUDA, GEOMETRIES, Cost, apart


class Unavailable(Exception):
    """A path that cannot run here, and why."""


def parser_of(description: str | None, lengths: Iterable[str]) -> argparse.ArgumentParser:
    """A parser of the options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--lengths", choices=lengths, default="fixed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="completions of a step")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def parsed(parser: argparse.ArgumentParser, paths: Iterable[str]) -> argparse.Namespace:
    """The arguments, with --paths as a list of some of `paths`, or all of them."""
    known = ",".join(paths)
    parser.add_argument("--paths", default=known)
    arguments = parser.parse_args()
    arguments.paths = arguments.paths.split(",")
    for path in arguments.paths:
        if path not in known.split(","):
            parser.error(f"--paths: expected some of {known}, got {path!r}")
    return arguments


def measure_in_turns(
    arguments: argparse.Namespace, run: Callable[..., Cost | str], *further: Any
) -> tuple[dict[str, list[Cost]], dict[str, str]]:
    """Costs of each path by repeat, and the reasons of those that were skipped.

    `run(path, *further)` is called in a process of its own; a text is the reason.
    """
    costs: dict[str, list[Cost]] = {path: [] for path in arguments.paths}
    skipped: dict[str, str] = {}
    for _ in range(arguments.repeats):
        for path in [path for path in costs if path not in skipped]:
            found = apart(arguments.threads, run, path, *further)
            if isinstance(found, Cost):
                costs[path].append(found)
            else:
                skipped[path] = found
    return {path: own for path, own in costs.items() if path not in skipped}, skipped


def ratio(costs: Mapping[str, Sequence[Cost]], path: str, other: str, what: str) -> float:
    """The median over repeats of path / other."""
    pairs = zip(costs[path], costs[other], strict=True)
    return statistics.median(vars(a)[what] / vars(b)[what] for a, b in pairs)


# TRL


def trl_module(name: str) -> Any:
    """A module of TRL, or of our adapter, which needs TRL."""
    try:
        importlib.import_module("trl")
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"TRL >= 1.16 cannot be imported: {error}") from None


def trl_config(out: Path, dtype: str, **options: Any) -> Any:
    """The configuration of TRL's trainer, for a benchmark, which keeps and reports nothing."""
    return trl_module("trl").DistillationConfig(
        output_dir=str(out),
        bf16=dtype == "bfloat16",
        use_cpu=not CUDA,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        **options,
    )
