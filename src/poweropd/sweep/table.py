"""The table of a sweep, like the paper's Tables 2 and 3: for a terminal, Markdown, CSV, JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from poweropd.evaluation.metrics import Estimate
from poweropd.runs.metrics import OF_BENCHMARKS, OF_GRADIENTS, OF_STEPS
from poweropd.sweep import paper
from poweropd.sweep.comparison import MEAN
from poweropd.sweep.results import BenchmarkFigures, Row

#: Metric of a benchmark -> how the table shows it.
ACCURACIES = {key: metric.sweep for key, metric in OF_BENCHMARKS.items() if metric.sweep}
#: Column of the training -> how the table shows it.
TRAINING = {m.column: m.sweep for m in (*OF_STEPS, *OF_GRADIENTS) if m.sweep}
NO_EVALUATION = (
    "There are no accuracies, for the runs were not evaluated: give the recipe a section such as "
    "evaluate: {every: 500, benchmarks: [math500], n: 8}"
)
WIDEST = 1000
SYMBOL, EMPHASIS = "{} ▲", "**{}**"  # how a terminal and Markdown mark the best


def print_table(rows: Sequence[Row], best: bool, baseline: str | None, console: Console) -> None:
    """Prints accuracies (intervals for the only benchmark, or the mean over all), then training."""
    tables = [_accuracies(rows, best, baseline)] if evaluated(rows) else []
    if training_columns(rows):
        tables.append(_trainings(rows))
    for table in tables:
        # Lines that a narrow terminal wraps are better than numbers cut short.
        needed = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
        console.width = max(console.width, needed)
        console.print(table)


def _accuracies(rows: Sequence[Row], best: bool, baseline: str | None) -> Table:
    names = evaluated(rows)
    detailed = MEAN if MEAN in names else names[0]
    differing = any(row.minus_baseline for row in rows)
    table = _empty_table(accuracy_caption(rows, best, baseline, SYMBOL.format("")))
    for name in names:
        titles = [_title(rows, name, key) for key in _metrics(rows, name)]
        table.add_column("\n".join([name, *titles]), justify="right", no_wrap=True)
    if differing:
        table.add_column(f"minus\n{baseline}", justify="right")
    table.add_column("Len", justify="right")
    for row in rows:
        cells = [
            "\n".join(
                _estimate(row, name, key, SYMBOL, name == detailed) for key in _metrics(rows, name)
            )
            for name in names
        ]
        cells += [_difference(row, detailed)] if differing else []
        table.add_row(_name(row), *cells, _length(row.benchmarks.get(detailed)))
        if row.of_paper is not None:
            theirs = [
                "\n".join(_paper(row.of_paper, name, key) for key in _metrics(rows, name))
                for name in names
            ]
            length = row.of_paper[detailed].mean_length if detailed in row.of_paper else None
            length_text = "" if length is None else f"{length:.0f}"
            theirs += [""] if differing else []
            table.add_row(f"  paper (k = {paper.k()})", *theirs, length_text, style="dim")
    return table


def _trainings(rows: Sequence[Row]) -> Table:
    columns = training_columns(rows)
    table = _empty_table(training_caption(rows))
    for column in columns:
        table.add_column(TRAINING[column].heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(_name(row), *_training(row, columns))
    return table


def _empty_table(caption: str) -> Table:
    """Returns an empty, narrow table whose first column is for the cells."""
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("", overflow="fold", min_width=20)
    return table


def accuracy_caption(rows: Sequence[Row], best: bool, baseline: str | None, mark: str) -> str:
    """Returns what the accuracies and their differences are, and what is marked."""
    step = "best evaluated" if best else "last"
    text = (
        f"Accuracy in %, of each run's {step} step: mean over seeds [95% interval over problems "
        "and seeds]. Len: mean completion length there."
    )
    if any(row.minus_baseline for row in rows):
        text += (
            f" Minus {baseline}: difference of {_title(rows, evaluated(rows)[0], 'avg_at_k')}, "
            "paired by problem and seed."
        )
    if any(row.best for row in rows):
        text += f" {mark.strip()}: better than every other row, by such a paired interval."
    elif len(rows) > 1:
        text += " No row is better than every other one by such a paired interval."
    return text


def training_caption(rows: Sequence[Row]) -> str:
    """Returns what the columns of the training are and, if there are no accuracies, why."""
    text = (
        "KL to the teacher (an estimate from the sampled tokens), length of completions, fraction "
        "cut at the limit: in the last tenth of training. Grad norm: median of all steps. s: "
        "seconds of all steps."
    )
    if "snr_start" in training_columns(rows):
        text += (
            " SNR: signal-to-noise ratio of a batch's gradient; cos: its mean cosine to the exact, "
            "full-vocabulary gradient of the same reward."
        )
    return text if evaluated(rows) else f"{text}\n{NO_EVALUATION}"


def markdown(rows: Sequence[Row], best: bool, baseline: str | None) -> str:
    """Returns one table with every mean, its interval and its difference from the baseline."""
    names, columns = evaluated(rows), training_columns(rows)
    shown = [(name, key) for name in names for key in _metrics(rows, name)]
    differing = [name for name in names if any(name in row.minus_baseline for row in rows)]
    headings = ["", *(f"{name} {_title(rows, name, key)}" for name, key in shown)]
    headings += [f"{name} {_title(rows, name, 'avg_at_k')} minus {baseline}" for name in differing]
    headings += [f"{name} len" for name in names] + [TRAINING[c].heading for c in columns]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for row in rows:
        cells = [_name(row)]
        cells += [_estimate(row, name, key, EMPHASIS, True) for name, key in shown]
        cells += [_difference(row, name) for name in differing]
        cells += [_length(row.benchmarks.get(name)) for name in names]
        lines.append([*cells, *_training(row, columns)])
        if row.of_paper is not None and shown:
            lengths = [
                f"{row.of_paper[n].mean_length:.0f}" if n in row.of_paper else "" for n in names
            ]
            cells = [f"*paper (k = {paper.k()})*", *(_paper(row.of_paper, *s) for s in shown)]
            blank = [""] * len(differing)
            lines.append([*cells, *blank, *lengths, *([""] * len(columns))])
    text = "\n".join(f"| {' | '.join(' '.join(c.split()) for c in line)} |" for line in lines)
    legend = accuracy_caption(rows, best, baseline, "Bold") if names else ""
    return "\n\n".join(part for part in (text, legend, training_caption(rows)) if part) + "\n"


def as_csv(rows: Sequence[Row], baseline: str | None) -> str:
    """Returns one line for each cell: fractions and tokens, and an empty field for no number."""
    found = [_flat(row, baseline) for row in rows]
    columns = list(dict.fromkeys(key for one in found for key in one))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def as_json(rows: Sequence[Row], best: bool, baseline: str | None) -> str:
    """Returns all rows with their figures, the baseline, and of which step they are."""
    content = {
        "step": "best" if best else "last",
        "baseline": baseline,
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(content, indent=2) + "\n"


def evaluated(rows: Sequence[Row]) -> list[str]:
    """Returns the names of the benchmarks that any of the rows has."""
    return list(dict.fromkeys(name for row in rows for name in row.benchmarks))


def training_columns(rows: Sequence[Row]) -> list[str]:
    """Returns the columns of the training that any of the rows has."""
    return [column for column in TRAINING if any(column in row.training for row in rows)]


def _metrics(rows: Sequence[Row], name: str) -> list[str]:
    """Returns the accuracies to show: Avg@1 and Pass@1 are the same, so only one of them."""
    return list(ACCURACIES)[: 1 if _k(rows, name) == 1 else None]


def _k(rows: Sequence[Row], name: str) -> int:
    return next(row.benchmarks[name].k for row in rows if name in row.benchmarks)


def _title(rows: Sequence[Row], name: str, key: str) -> str:
    return f"{ACCURACIES[key].heading}{_k(rows, name)}"


def _name(row: Row) -> str:
    if row.finished == row.seeds:
        return row.cell
    failed = f", {len(row.failed)} failed" if row.failed else ""
    return f"{row.cell} ({row.finished} of {row.seeds} seeds{failed})"


def _estimate(row: Row, name: str, key: str, mark: str, interval: bool) -> str:
    if name not in row.benchmarks:
        return "–"
    found = Estimate(**asdict(row.benchmarks[name])[key])
    text = ACCURACIES[key].text(found.mean)
    text = mark.format(text) if key in row.best.get(name, ()) else text
    return f"{text}\n[{100 * found.low:.1f}, {100 * found.high:.1f}]" if interval else text


def _difference(row: Row, name: str) -> str:
    """Returns the difference from the baseline in percentage points, with its interval."""
    if name not in row.minus_baseline:
        return "–"
    found = row.minus_baseline[name]
    return f"{100 * found.mean:+.2f}\n[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _length(found: BenchmarkFigures | None) -> str:
    return "–" if found is None else f"{found.mean_length:.0f}"


def _training(row: Row, columns: Sequence[str]) -> list[str]:
    return [TRAINING[column].text(row.training.get(column)) for column in columns]


def _paper(found: dict[str, paper.Figures], name: str, key: str) -> str:
    return ACCURACIES[key].text(asdict(found[name])[key]) if name in found else ""


def _flat(row: Row, baseline: str | None) -> dict[str, object]:
    flat: dict[str, object] = {"cell": row.cell, "seeds": row.seeds, "finished": row.finished}
    for name, found in row.benchmarks.items():
        for key, shown in ACCURACIES.items():
            estimate = asdict(found)[key]
            flat |= {
                f"{name} {shown.heading}{found.k}{part.removeprefix(' mean')}": estimate[
                    part.strip()
                ]
                for part in (" mean", " low", " high")
            }
        flat[f"{name} length"] = found.mean_length
        if name in row.minus_baseline:
            minus = f"{name} {ACCURACIES['avg_at_k'].heading}{found.k} minus {baseline}"
            pair = row.minus_baseline[name]
            flat |= {minus: pair.mean, f"{minus} low": pair.low, f"{minus} high": pair.high}
        if row.of_paper is not None and name in row.of_paper:
            theirs: dict[str, object] = {
                f"{name} paper {shown.heading}{paper.k()}": asdict(row.of_paper[name])[key]
                for key, shown in ACCURACIES.items()
            }
            flat |= {**theirs, f"{name} paper length": row.of_paper[name].mean_length}
    return flat | {f"training {key}": value for key, value in row.training.items()}
