"""The paper's own results (arXiv:2606.17199, Tables 2 and 3), to stand beside a sweep's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Any

from poweropd.config import Config


@dataclass(frozen=True)
class Figures:
    """Avg@8 and Pass@8 as fractions, mean completion length in tokens."""

    avg_at_k: float
    pass_at_k: float
    mean_length: float


@cache
def _tables() -> dict[str, Any]:
    return dict(json.loads(files(__package__).joinpath("paper.json").read_text("utf-8")))


def k() -> int:
    return int(_tables()["k"])


def results(config: Config, benchmarks: Sequence[str]) -> dict[str, Figures] | None:
    """What the paper reports for these models and this reward: benchmark -> figures.

    Where it has all of `benchmarks`, also "mean" -> their means over these. None where it has no
    such row. A row states the settings it stands for; the parameters that it
    leaves open (the paper gives no temperature for tanh) are not compared.
    """
    flat = config.flat()
    pair = {"teacher": flat["teacher.model"], "student": flat["model.student"]}
    names = {role: str(name).rstrip("/").rpartition("/")[2] for role, name in pair.items()}
    for row in _tables()["rows"]:
        same_pair = all(row[role] == name for role, name in names.items())
        if same_pair and all(flat.get(key) == value for key, value in row["cell"].items()):
            return _figures(row["results"], benchmarks)
    return None


def _figures(
    results: Mapping[str, Sequence[float]], benchmarks: Sequence[str]
) -> dict[str, Figures]:
    found = {name: results[name] for name in benchmarks if name in results}
    if found and len(found) == len(benchmarks):
        found["mean"] = [fmean(column) for column in zip(*found.values(), strict=True)]
    return {name: Figures(a / 100, p / 100, length) for name, (a, p, length) in found.items()}
