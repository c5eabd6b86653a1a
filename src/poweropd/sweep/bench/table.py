"""The tables of a bench, for a terminal and in Markdown."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Drawn

from poweropd.evaluation.intervals import Estimate
from poweropd.report.tables import ABSENT, Table
from poweropd.runs.bins import FAR
from poweropd.runs.metrics import OF_DIVERGENCE, Shown
from poweropd.sweep.bench.results import SIGNALS, BenchResults, Difference, SettingFigures
from poweropd.sweep.bench.trials import KL
from poweropd.sweep.comparison import MEAN

PERCENT, NATS = Shown("", ".1f", factor=100.0), Shown("", ".3f")
WIDEST = 1000


def tables(found: BenchResults) -> list[Table]:
    """Returns all tables; one without any row is left out."""
    made = [achieved_table(found), signals_table(found), answers_table(found), rates_table(found)]
    return [table for table in made if table.rows]


def achieved_table(found: BenchResults) -> Table:
    """Returns what each setting achieved, and its differences from the baseline."""
    benchmark = _shown_benchmark(found)
    accuracy = [f"{benchmark}, %", f"minus {found.baseline}"] if benchmark else []
    columns = ["setting", "rate", *accuracy, "held-out KL", f"minus {found.baseline}"]
    most = max((len(row.seeds) for row in found.rows), default=0)
    rows = [[_with_seeds(row, most), *_achieved(row, benchmark)] for row in found.rows if row.seeds]
    start = found.before
    if start and rows:
        own = [PERCENT.text(start[benchmark]), ""] if benchmark else []
        rows.insert(0, ["before training", "", *own, NATS.text(start.get("divergence")), "", ""])
    if found.teacher and benchmark and rows:
        rows.append(["teacher", "", PERCENT.text(found.teacher[benchmark]), "", "", "", ""])
    metric = OF_DIVERGENCE[KL]
    caption = (
        f"Held-out KL: {metric.heading}, lower is better. Means over seeds, with 95% intervals "
        "that resample seeds and problems or prompts; differences are paired by both. Forgetting: "
        "divergence from the start on other prompts, in nats per token."
    )
    return Table(caption, [*columns, "forgetting"], rows)


def _achieved(row: SettingFigures, benchmark: str) -> list[str]:
    minus = row.minus_baseline or Difference({}, None)
    cells = [_mean_and_ends(row.accuracy.get(benchmark), PERCENT)] if benchmark else []
    cells += [_mean_and_ends(minus.accuracy.get(benchmark), PERCENT, "+")] if benchmark else []
    cells += [_mean_and_ends(row.divergence, NATS), _mean_and_ends(minus.divergence, NATS, "+")]
    rate = ABSENT if row.rate is None else f"{row.rate:g}"
    return [rate, *cells, _mean_and_ends(row.forgetting, NATS)]


def signals_table(found: BenchResults) -> Table:
    """Returns what the trainings looked like from inside."""
    rows = [row for row in found.rows if row.signals]
    keys = [key for key in SIGNALS if any(key in row.signals for row in rows)]
    caption = (
        "SNR and cosine to the exact gradient of the same reward: at the start. Far: tokens with a "
        f"log ratio of {FAR:g} nats or more; far, reward 0, length and entropy are of the last "
        "tenth of the steps. Lowest reward, and median gradient norm and seconds: of all steps. "
        "GiB: peak memory of the process, in which with --series others ran before."
    )
    cells = [
        [row.setting, *(SIGNALS[key].text(row.signals.get(key)) for key in keys)] for row in rows
    ]
    return Table(caption, ["setting", *(SIGNALS[key].heading for key in keys)], cells)


def answers_table(found: BenchResults) -> Table:
    """Returns the questions with the differences that answer them."""
    benchmark = _shown_benchmark(found)
    columns = ["question", "difference", *([f"{benchmark}, points"] if benchmark else [])]
    rows = []
    for question, minus in ((one.question, one.difference) for one in found.answers):
        cells = [_mean_and_ends(minus.accuracy.get(benchmark), PERCENT, "+")] if benchmark else []
        pair = f"{question.first} \N{MINUS SIGN} {question.second}"
        rows.append([question.text, pair, *cells, _mean_and_ends(minus.divergence, NATS, "+")])
    caption = "Each setting at its own rate; paired by seed and problem or prompt."
    answered = [row for row in rows if set(row[2:]) != {ABSENT}]
    return Table(caption, [*columns, "held-out KL"], answered, names=2)


def rates_table(found: BenchResults) -> Table:
    """Returns the divergence by learning rate, by which the rates were chosen."""
    rates = sorted({float(rate) for row in found.rows for rate in row.rates})
    names = [f"{rate:g}" for rate in rates]
    rows = [
        [row.setting, *(_of_rate(row, name, found.metric) for name in names)]
        for row in found.rows
        if row.rates
    ]
    what = "Reverse KL on the held-out prompts" if found.metric == KL else "Accuracy in %"
    caption = f"{what} by learning rate, one seed; the rate with the best one was taken."
    return Table(caption, ["setting", *names], rows)


def _of_rate(row: SettingFigures, rate: str, metric: str) -> str:
    if rate not in row.rates:
        return ""
    value = row.rates[rate]
    text = NATS.text(value, "diverged")
    if metric != KL and value is not None:
        text = PERCENT.text(1 - value)
    return f"**{text}**" if row.rate is not None and rate == f"{row.rate:g}" else text


def paid_lines(found: BenchResults) -> list[str]:
    """Returns a line for each stage that was paid for."""
    return [
        f"{stage}: {cost['runs']:.0f} runs, {cost['cpu_seconds']:.0f} CPU seconds, "
        f"{cost['seconds'] / 60:.1f} minutes"
        for stage, cost in found.cost.items()
    ]


def as_markdown(found: BenchResults) -> str:
    """Returns all tables with their captions, and what they cost."""
    parts = []
    for table in tables(found):
        rule = [*["---"] * table.names, *["---:"] * (len(table.columns) - table.names)]
        lines = [table.columns, rule, *table.rows]
        parts += ["\n".join(f"| {' | '.join(line)} |" for line in lines), table.caption]
    return "\n\n".join([*parts, "\n".join(paid_lines(found))]).strip() + "\n"


def print_tables(found: BenchResults, console: Console) -> None:
    """Prints all tables, as wide as they need to be."""
    for table in tables(found):
        drawn = Drawn(caption=table.caption, caption_justify="left", box=SIMPLE_HEAD, padding=0)
        for number, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if number < table.names else "right")
        for row in table.rows:
            drawn.add_row(*(cell.replace("**", "") for cell in row))
        needed = console.measure(drawn, options=console.options.update(max_width=WIDEST)).maximum
        console.width = max(console.width, needed)
        console.print(drawn)


def _shown_benchmark(found: BenchResults) -> str:
    """Returns the benchmark to show: the mean over several, the only one, or "" for none."""
    names = list(dict.fromkeys(name for row in found.rows for name in row.accuracy))
    return MEAN if MEAN in names else (names or [""])[0]


def _with_seeds(row: SettingFigures, most: int) -> str:
    """Returns a setting's name, with its number of seeds if others have more."""
    diverged = f", {len(row.diverged)} diverged" if row.diverged else ""
    fewer = f" ({len(row.seeds)} seeds{diverged})" if len(row.seeds) < most or diverged else ""
    return f"{row.setting}{fewer}"


def _mean_and_ends(found: Estimate | None, shown: Shown, sign: str = "") -> str:
    """Returns a mean with its interval."""
    if found is None:
        return ABSENT
    values = (found.mean, found.low, found.high)
    mean, low, high = (f"{value * shown.factor:{sign}{shown.format}}" for value in values)
    return f"{mean} [{low}, {high}]"
