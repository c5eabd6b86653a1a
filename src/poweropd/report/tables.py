"""Tables of a report: what came out, how the runs differ, what they ran on."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poweropd.config.recipe_file import flatten
from poweropd.report.runs import RecordedRun

ABSENT = "\N{EN DASH}"
TASK = ("data.prompts", "data.column", "model.student", "teacher.model")
ENDS = ("start", "end")  # when a sweep measures gradients
END = 10  # the last 1/END of the steps stand for the end of training


@dataclass(frozen=True)
class Table:
    """Rows begin with their header; so does every column."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def summary_table(runs: Sequence[RecordedRun]) -> Table:
    """One row a run."""
    benchmarks = list(dict.fromkeys(e.benchmark for run in runs for e in run.evaluations))
    columns = ["run", "reward", "state", *(f"Avg@k on {b}" for b in benchmarks), *FIGURES]
    measured = any(run.gradients for run in runs)
    columns += [f"gradient SNR at the {when}" for when in ENDS if measured]
    rows = [
        [
            run.name,
            str(run.config.get("reward.name", ABSENT)),
            run.status,
            *(_accuracy(run, benchmark) for benchmark in benchmarks),
            *(make(run) for make in FIGURES.values()),
            *(_gradient_snr(run, when) for when in ENDS if measured),
        ]
        for run in runs
    ]
    caption = (
        "Accuracies are the last ones measured, with 95% intervals over problems. Lengths, "
        "truncated completions, reverse KL and gradient norm are of the last tenth of the steps."
    )
    return Table(caption, columns, rows)


def _accuracy(run: RecordedRun, benchmark: str) -> str:
    own = [e for e in run.evaluations if e.benchmark == benchmark]
    if not own:
        return ABSENT
    mean, low, high = (100 * own[-1].result["avg_at_k"][key] for key in ("mean", "low", "high"))
    return f"{mean:.1f}% [{low:.1f}, {high:.1f}] at step {own[-1].step}"


def _number(
    key: str, form: str, combine: Callable[[Sequence[float]], float] = statistics.fmean,
    last: bool = True, factor: float = 1.0,
) -> Callable[[RecordedRun], str]:  # fmt: skip
    """A metric as text, of the end of the run or of all of it."""

    def text(run: RecordedRun) -> str:
        values = run.series(key)[1]
        if not values:
            return ABSENT
        shown = values[-max(1, len(values) // END) :] if last else values
        return f"{combine(shown) * factor:{form}}"

    return text


def _gradient_snr(run: RecordedRun, when: str) -> str:
    """As a sweep measures it; of the gradient that trains, whatever its norm."""
    found = run.gradients.get(when, {}).get("gradient_snr")
    return ABSENT if found is None else f"{found:.3g}"


def _duration(run: RecordedRun) -> str:
    seconds = round(sum(run.series("seconds/step")[1]))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}" if seconds else ABSENT


FIGURES: Mapping[str, Callable[[RecordedRun], str]] = {
    "length": _number("completions/mean_length", ".0f"),
    "truncated, %": _number("completions/truncated_fraction", ".1f", factor=100.0),
    "reverse KL": _number("reverse_kl", ".4f"),
    "gradient norm": _number("grad_norm", ".3g", statistics.median),
    "seconds a step": _number("seconds/step", ".3g", statistics.median, last=False),
    "time": _duration,
    "peak memory, GiB": _number("memory/peak_bytes", ".2f", max, last=False, factor=2.0**-30),
    "trained tokens": _number("num_tokens", ",.0f", sum, last=False),
}


def differences_table(runs: Sequence[RecordedRun]) -> Table:
    """The settings that are not the same in all runs; where a run is written is not one."""
    table = settings_table(runs)
    rows = [row for row in table.rows if len(set(row[1:])) > 1]
    return Table("Settings that differ between the runs.", table.columns, rows)


def settings_table(runs: Sequence[RecordedRun]) -> Table:
    configs = [run.config for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key != "run.dir")
    rows = [[key, *(_text(config, key) for config in configs)] for key in keys]
    return Table("All settings.", ["setting", *(run.name for run in runs)], rows)


def environment_table(runs: Sequence[RecordedRun]) -> Table:
    flat = [flatten(run.environment) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [[key, *(_text(one, key) for one in flat)] for key in keys]
    return Table("Versions and hardware.", ["", *(run.name for run in runs)], rows)


def _text(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else ABSENT


def comparison_notes(runs: Sequence[RecordedRun]) -> list[str]:
    """What to bear in mind in comparing these runs."""
    found = [f"{run.name}: {note}" for run in runs for note in run.notes]
    configs = [run.config for run in runs]
    differing = [key for key in TASK if len({str(config.get(key)) for config in configs}) > 1]
    if differing:
        found.append(
            f"The runs differ in {', '.join(differing)}: they are of different tasks, and neither "
            "accuracy nor reward nor KL says which run is better."
        )
    if len({str(run.recipe.get("reward")) for run in runs}) > 1:
        found.append(
            "The runs have different rewards, whose values, losses and gradient norms differ in "
            "units: compare reverse KL, log ratios, lengths and accuracy."
        )
    return found
