"""What runs say about the paper's claims on gradient norms, tails, positions and persistence.

    python benchmarks/claims.py RUN... [--first 8 --last 8]

One line for each run directory. Norms and rewards are of all steps. "far" is the share of tokens
with |ln t - ln p| of at least 4, at the first 16 positions and at later ones, in the first and the
last recorded block of steps. The last columns have means over the first and the last steps. Below
stands the sampled reverse KL of early minus later positions, with a 95% interval over steps.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import numpy as np
from common import print_table

from poweropd.evaluation.intervals import paired_ratios
from poweropd.report.distributions import EARLY, PERSISTENCE
from poweropd.report.runs import RecordedRun
from poweropd.runs.directory import run_directories
from poweropd.runs.statistics import UNIT

FAR_ROWS = next(plot.rows for plot in PERSISTENCE if plot.key == "far-over-training")


def figures(run: RecordedRun, first: int, last: int) -> list[str]:
    """Returns a run's line of the table."""
    trained = [row for row in run.metrics if row["num_tokens"]]  # the first steps may have none
    norms = [row["grad_norm"] for row in trained]
    far = defaultdict(list)
    for row in FAR_ROWS(run):
        far[row["kind"]].append(row["value"])
    ends = (trained[:first], trained[-last:])
    lengths = [fmean(row["completions/mean_length"] for row in rows) for rows in ends]
    lowest = [min(row["reward/min"] for row in rows) for rows in ends]
    return [
        run.name,
        f"{median(norms):.3g}",
        f"{max(norms) / median(norms):.1f}",
        f"{min(row['reward/min'] for row in trained):.3g}",
        f"{max(row['reward/max'] for row in trained):.3g}",
        *(f"{values[0]:.1%} {values[-1]:.1%}" for values in far.values()),
        f"{lowest[0]:.3g} {lowest[1]:.3g}",
        f"{lengths[0]:.1f} {lengths[1]:.1f}",
    ]


def early_minus_later(run: RecordedRun) -> list[str]:
    """Returns the reverse KL of early and of later positions, and their difference over steps."""
    table = run.rewards.positions
    steps, early = table["step"].to_numpy(), table["position"].to_numpy() < EARLY
    kl, count = -table["log_ratio_sum"].to_numpy() * UNIT, table["count"].to_numpy()
    sides = [
        {
            str(step): (kl[own & (steps == step)].sum(), count[own & (steps == step)].sum())
            for step in np.unique(steps).tolist()
        }
        for own in (early, ~early)
    ]
    means = [sum(x for x, _ in one.values()) / sum(n for _, n in one.values()) for one in sides]
    found = paired_ratios(*sides)
    texts = [f"{mean:.3f}" for mean in means]
    return [run.name, *texts, f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--first", type=int, default=8)
    parser.add_argument("--last", type=int, default=8)
    given = parser.parse_args(arguments)
    runs = [RecordedRun(path.name, path) for path in run_directories(given.runs)]
    header = ["run", "norm", "max / median", "lowest", "highest", "far early", "far later"]
    header += ["lowest, ends", "length, ends"]
    print_table(header, [figures(run, given.first, given.last) for run in runs])
    print_table(["run", "early KL", "later KL", "difference"], [early_minus_later(r) for r in runs])


if __name__ == "__main__":
    main()
