"""Tables of a report: what the runs achieved, how they differ, what they ran on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poweropd.config.recipe_file import flatten
from poweropd.report.runs import RecordedRun, benchmarks
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import OF_DIVERGENCE, OF_GRADIENTS, OF_STEPS, TOTAL, Shown

ABSENT = "\N{EN DASH}"
NO_BREAK = "\N{NO-BREAK SPACE}"
PERCENT = Shown("", ".1%")
_PARTS = re.compile(r"\[[^\]]*\]|at step \d+")
TASK = ("data.prompts", "data.column", "model.student", "teacher.model")


@dataclass(frozen=True)
class Table:
    """A table whose rows begin with their header; the first `names` columns are words."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1


def summary_table(runs: Sequence[RecordedRun]) -> Table:
    """Returns the table of results: one row for each run."""
    gradients = OF_GRADIENTS if any(run.gradients for run in runs) else ()
    measured = [(m.key, m.table) for m in gradients if m.table]
    shown = [(m.key, m.table) for m in OF_STEPS if m.table]
    names = benchmarks(runs)
    judged = {k: m for k, m in OF_DIVERGENCE.items() if any(run.divergences for run in runs)}
    divergence = [(name, m.table) for name, m in judged.items() if m.table and m.curve]
    columns = ["run", "reward", "state", *(f"Avg@k on {name}" for name in names)]
    columns += [table.heading for _, table in (*divergence, *shown)] + ["time"]
    columns += [table.heading for _, table in measured]
    rows = [
        [
            run.name,
            str(run.config.get("reward.name", ABSENT)),
            run.status,
            *(_last_accuracy(run, name) for name in names),
            *(_last_divergence(run, name, table) for name, table in divergence),
            *(table.text(table.summary.of(run.metrics, key), ABSENT) for key, table in shown),
            _duration(run),
            *(table.text(run.gradients.get(key), ABSENT) for key, table in measured),
        ]
        for run in runs
    ]
    caption = (
        "Accuracies and figures on held-out prompts are the last ones measured, with 95% intervals "
        "over problems or prompts. Lengths, truncated completions, reverse KL (a sampled estimate) "
        "and gradient norm are of the last tenth of the steps."
    )
    return Table(caption, columns, rows)


def interval(found: JsonObject, cell: Shown) -> str:
    """Returns an estimate as a table writes it: the mean and the ends of its interval."""
    mean, low, high = (cell.text(found[key]) for key in ("mean", "low", "high"))
    # One percent sign is enough.
    return f"{mean} [{low.removesuffix('%')}, {high.removesuffix('%')}]"


def together(cell: str) -> str:
    """Returns a table's cell with spaces that do not break within an interval or a step."""
    return _PARTS.sub(lambda part: part[0].replace(" ", NO_BREAK), cell)


def _last_accuracy(run: RecordedRun, benchmark: str) -> str:
    found = run.results(benchmark)
    if not found:
        return ABSENT
    step, result = found[-1]
    return f"{interval(result['avg_at_k'], PERCENT)} at step {step}"


def _last_divergence(run: RecordedRun, name: str, cell: Shown) -> str:
    found = [(step, figures[name]) for step, figures in run.divergences.items() if name in figures]
    return f"{interval(found[-1][1], cell)} at step {found[-1][0]}" if found else ABSENT


def _duration(run: RecordedRun) -> str:
    seconds = round(TOTAL.of(run.metrics, "seconds/step") or 0)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}" if seconds else ABSENT


def differences_table(runs: Sequence[RecordedRun]) -> Table:
    """Returns the settings that are not the same in all runs, without the run's directory."""
    table = settings_table(runs)
    rows = [row for row in table.rows if len(set(row[1:])) > 1]
    return Table("Settings that differ between the runs.", table.columns, rows)


def settings_table(runs: Sequence[RecordedRun]) -> Table:
    """Returns all settings of the runs, without the run's directory."""
    settings = [{k: v for k, v in run.config.items() if k != "run.dir"} for run in runs]
    return _side_by_side("All settings.", "setting", runs, settings)


def environment_table(runs: Sequence[RecordedRun]) -> Table:
    """Returns the versions and hardware of the runs."""
    environments = [flatten(run.environment) for run in runs]
    return _side_by_side("Versions and hardware.", "", runs, environments)


def _side_by_side(
    caption: str, corner: str, runs: Sequence[RecordedRun], values: Sequence[Mapping[str, object]]
) -> Table:
    """Returns one row for each key, with the values that the runs have for it."""
    keys = dict.fromkeys(key for one in values for key in one)
    rows = [[key, *(str(one.get(key, ABSENT)) for one in values)] for key in keys]
    return Table(caption, [corner, *(run.name for run in runs)], rows)


def comparison_notes(runs: Sequence[RecordedRun]) -> list[str]:
    """Returns what a reader must know to compare these runs."""
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
