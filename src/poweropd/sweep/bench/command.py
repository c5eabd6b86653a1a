"""What `poweropd bench` does: says the cost, chooses rates, trains with seeds, tabulates."""

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO

from poweropd.runs.files import read_jsonl, write_atomically, write_json
from poweropd.sweep import command, runner
from poweropd.sweep.bench import results, table
from poweropd.sweep.bench.trials import (
    FACTOR,
    WIDER,
    Bench,
    Rates,
    best_rate,
    first_rates,
    further_rate,
)
from poweropd.sweep.jobs import Series, Training
from poweropd.sweep.runner import SweepOutcome
from poweropd.terminal import make_console, print_line

RATES, SEEDS = "learning rates", "seeds"  # the two stages
COSTS = "costs.jsonl"


@dataclass(frozen=True)
class Running:
    """How trainings become processes: `parallel` at a time, each for `series` trainings."""

    parallel: int = 1
    series: int = 1


def run_bench(bench: Bench, left_out: Mapping[str, str], how: Running, dry_run: bool) -> int:
    """Runs what is not finished, and prints and writes the tables; returns the exit status.

    Raises RunError, after the tables, if a training failed for another reason than that it
    diverged.
    """
    console = make_console()
    for name, why in left_out.items():
        print_line(console, f"{name} is left out: {why}")
    tried = {name: first_rates(bench.base.train.learning_rate) for name in bench.settings}
    if dry_run:
        first = {name: rates[0] for name, rates in tried.items()}
        command.print_trainings([*_at_rates(bench, tried), *bench.with_seeds(first)], how.parallel)
        print_line(
            console,
            f"Rates {FACTOR:g} times as high or low follow, up to {WIDER} for a setting, while its "
            "best one is at an end of those tried.",
        )
        return 0
    with runner.only_sweep(bench.out) as lock:
        outcome, found = _choose_rates(bench, tried, lock, how)
        rates = {name: best_rate(own) for name, own in found.items() if own}
        best = {name: rate for name, rate in rates.items() if rate is not None}
        trainings, count = bench.with_seeds(best), sum(map(len, tried.values()))
        if not outcome.unfinished:
            outcome, count = _run(bench, trainings, SEEDS, lock, how), len(trainings)
        _show_bench(bench, found, trainings)
        return command.exit_status(bench.out, outcome, count)


def _choose_rates(
    bench: Bench, tried: dict[str, list[float]], lock: IO[str], how: Running
) -> tuple[SweepOutcome, dict[str, Rates]]:
    """Tries the rates, and further ones where the best is at an end; returns their figures."""
    while True:
        trainings = _at_rates(bench, tried)
        outcome = _run(bench, trainings, RATES, lock, how)
        found: dict[str, Rates] = {
            name: results.rate_figures([one for one in trainings if one.cell == name], bench.metric)
            for name in tried
        }
        if outcome.unfinished:
            return outcome, found
        further = {name: further_rate(own) for name, own in found.items()}
        if not any(further.values()):
            return outcome, found
        for name, rate in further.items():
            tried[name] += [] if rate is None else [rate]


def _at_rates(bench: Bench, tried: Mapping[str, Sequence[float]]) -> list[Training]:
    return [bench.at_rate(name, rate) for name, rates in tried.items() for rate in rates]


def _run(
    bench: Bench, trainings: Sequence[Training], stage: str, lock: IO[str], how: Running
) -> SweepOutcome:
    """Runs the trainings that are not finished, and adds what they cost to the file of costs."""
    left = [one for one in trainings if not one.is_finished()]
    if not left:
        return SweepOutcome()
    runner.claim(bench.out, trainings, {"snr": bench.batches}, among_others=True)
    started, before = time.perf_counter(), _cpu_seconds()
    size = min(how.series, math.ceil(len(left) / how.parallel))
    series = [Series(left[i : i + size]) for i in range(0, len(left), size)]
    outcome = runner.JobRunner(series, how.parallel, lock).run()
    outcome.unfinished = [one.name for one in left if not one.is_finished()]
    line = {
        "stage": stage,
        "runs": sum(one.is_finished() for one in left),
        "cpu_seconds": round(_cpu_seconds() - before, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    with (bench.out / COSTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return outcome


def _cpu_seconds() -> float:
    """Returns the CPU seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _show_bench(bench: Bench, tried: Mapping[str, Rates], trainings: Sequence[Training]) -> None:
    """Prints the tables, and writes bench.md and bench.json."""
    console, out = make_console(), bench.out
    found = results.bench_results(tried, bench.metric, trainings, read_jsonl(out / COSTS))
    table.print_tables(found, console)
    for line in table.paid_lines(found):
        print_line(console, line)
    write_atomically(out / "bench.md", table.as_markdown(found))
    write_json(out / "bench.json", asdict(found))
    print_line(console, f"tables: {out}/bench.md, figures: {out}/bench.json")
