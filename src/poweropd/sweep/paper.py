"""The results of the paper (arXiv:2606.17199, Tables 2 and 3), to stand beside a sweep's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import TypedDict

from poweropd.config import Config

MODELS = ("teacher.model", "model.student")


class PaperTables(TypedDict):
    """The content of paper.json; `rows` are one for each pair of models and way to train."""

    k: int
    rows: list["PaperRow"]


class PaperRow(TypedDict):
    """`cell`: the settings that a row stands for. `results`: Avg@k, Pass@k in percent, length."""

    teacher: str
    student: str
    cell: dict[str, object]
    results: dict[str, list[float]]


@dataclass(frozen=True)
class Figures:
    """Avg@8 and Pass@8 as fractions, mean completion length in tokens."""

    avg_at_k: float
    pass_at_k: float
    mean_length: float


@cache
def _tables() -> PaperTables:
    tables: PaperTables = json.loads(files(__package__).joinpath("paper.json").read_text("utf-8"))
    return tables


def k() -> int:
    """Returns the number of completions of each problem."""
    return _tables()["k"]


def results(config: Config, benchmarks: Sequence[str]) -> dict[str, Figures] | None:
    """Returns what the paper reports for a configuration's models and reward, by benchmark.

    If it has all of `benchmarks`, "mean" holds the means over these. None if no row fits. Settings
    that a row leaves open (the paper gives no temperature for tanh) are not compared.
    """
    flat = config.flat()
    pair = [str(flat[key]).rstrip("/").rpartition("/")[2] for key in MODELS]
    for row in _tables()["rows"]:
        if [row["teacher"], row["student"]] == pair and all(
            flat.get(key) == value for key, value in row["cell"].items()
        ):
            return _figures(row["results"], benchmarks)
    return None


def _figures(
    results: Mapping[str, Sequence[float]], benchmarks: Sequence[str]
) -> dict[str, Figures]:
    """Returns the figures as fractions and, if none of `benchmarks` is missing, their means."""
    found = {name: results[name] for name in benchmarks if name in results}
    if found and len(found) == len(benchmarks):
        found["mean"] = [fmean(column) for column in zip(*found.values(), strict=True)]
    return {name: Figures(a / 100, p / 100, length) for name, (a, p, length) in found.items()}
