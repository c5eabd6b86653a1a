"""What of a sweep's accuracies differs for sure: differences paired by problem and seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poweropd.evaluation.metrics import Estimate, paired_over_seeds, pass_values
from poweropd.runs.files import JsonObject

MEAN = "mean"  # the name of the mean over the benchmarks
Cells = Mapping[str, "CellResults"]


@dataclass(frozen=True)
class CellResults:
    """The evaluations of a cell: seed -> benchmark -> results, of those seeds that have any."""

    by_seed: Mapping[int, Mapping[str, JsonObject]]

    def values(self, name: str, key: str, seeds: Sequence[int]) -> NDArray[np.float64]:
        """Returns the [seeds, problems] values of a metric, in the order of the problems' ids."""
        return np.array([VALUES[key](self.by_seed[seed][name]) for seed in seeds])

    def problems(self, name: str) -> list[list[str]]:
        """Returns the sorted ids of each seed's problems."""
        return [sorted(found[name]["solved"]) for found in self.by_seed.values() if name in found]


def _in_order(fractions: Mapping[str, float]) -> NDArray[np.float64]:
    """Returns the values of problems in the order of their ids."""
    return np.array([fractions[id] for id in sorted(fractions)])


def _passes(result: JsonObject) -> NDArray[np.float64]:
    """Returns Pass@n of each problem, from its correct fraction.

    Which of the n completions were correct is not kept, and no figure at k = n depends on it.
    """
    counts = np.rint(_in_order(result.get("correct") or result["solved"]) * result["n"])
    return pass_values(np.arange(result["n"]) < counts[:, None])


#: Metric -> its values [problems] in a benchmark's results, in the order of the problems' ids.
VALUES: dict[str, Callable[[JsonObject], NDArray[np.float64]]] = {
    "avg_at_k": lambda result: _in_order(result["solved"]),
    "pass_at_k": _passes,
}


def benchmark_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the benchmarks behind each column: each alone and, if there are several, all."""
    return {name: [name] for name in names} | ({MEAN: [*names]} if len(names) > 1 else {})


def paired_difference(
    a: CellResults, b: CellResults, names: Sequence[str], key: str
) -> Estimate | None:
    """Returns a - b, averaged over these benchmarks and over the seeds that both cells have.

    It is None if no seed has all benchmarks in both cells, or if the problems are not the same.
    """
    seeds = [
        seed
        for seed in a.by_seed
        if seed in b.by_seed
        and all(name in cell.by_seed[seed] for cell in (a, b) for name in names)
    ]
    same = all(len({*map(tuple, [*a.problems(n), *b.problems(n)])}) == 1 for n in names)
    if not seeds or not same:
        return None
    return paired_over_seeds(
        *((a.values(name, key, seeds), b.values(name, key, seeds)) for name in names)
    )


def best_cell(cells: Cells, names: Sequence[str], key: str) -> str | None:
    """Returns the cell whose paired interval against every other cell is above zero, if any."""
    having = {c: r for c, r in cells.items() if any(set(names) <= {*f} for f in r.by_seed.values())}
    for cell, results in having.items():
        found = [paired_difference(results, having[o], names, key) for o in having if o != cell]
        if found and all(one is not None and one.low > 0 for one in found):
            return cell
    return None
