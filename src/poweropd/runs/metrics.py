"""The registry of metrics: one row for each number that a run writes.

A row says what the metric is called, in which unit it is, how a whole run's values become one
number, and where it is shown. The progress line, the report, the table of a sweep, the model card
and the trackers are filters over these rows.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

#: One line of metrics.jsonl: key -> number, or None if a number was not finite.
StepMetrics = dict[str, Any]


@dataclass(frozen=True)
class Aggregate:
    """How the values of a run become one number: `combine` over the last 1/`part` of its steps."""

    combine: Callable[[Sequence[float]], float]
    part: int = 1

    def of(self, rows: Sequence[StepMetrics], key: str) -> float | None:
        """Returns the number for the metric `key`, or None if no step of that part has it."""
        end = rows[-max(1, len(rows) // self.part) :]
        values = [row[key] for row in end if row.get(key) is not None]
        return self.combine(values) if values else None


END_MEAN = Aggregate(statistics.fmean, part=10)
END_MEDIAN = Aggregate(statistics.median, part=10)
MEDIAN, TOTAL, LARGEST = Aggregate(statistics.median), Aggregate(sum), Aggregate(max)


@dataclass(frozen=True)
class Shown:
    """How one place shows a metric: its heading there, its format, and its summary over a run."""

    heading: str
    format: str
    summary: Aggregate = END_MEAN
    factor: float = 1.0  # from the metric's unit to the heading's
    is_unit: bool = False  # the heading stands behind the number in a sentence

    def text(self, value: float | None, absent: str = "\N{EN DASH}") -> str:
        """Returns the value as this place writes it, or `absent` if there is none."""
        return absent if value is None else f"{value * self.factor:{self.format}}"

    def phrase(self, value: float) -> str:
        """Returns the value with its heading, as a sentence has it."""
        words = (self.text(value), self.heading)
        return " ".join(words if self.is_unit else words[::-1])


@dataclass(frozen=True)
class Metric:
    """One metric. Trackers get every metric under its key, except the step, which is their axis."""

    key: str  # in metrics.jsonl; * stands for any text
    title: str
    unit: str = ""
    column: str = ""  # its name in sweep.csv and sweep.json
    progress: Shown | None = None  # in the lines that training prints
    table: Shown | None = None  # in the report's summary of runs
    sweep: Shown | None = None  # in the table of a sweep
    curve: Literal["linear", "log", "zero", "reward"] | None = None  # in the report: its axis
    note: str = ""  # below its curve
    card: str = ""  # in the model card: its format
    better: Literal["higher", "lower"] = "higher"  # of two evaluations

    @property
    def heading(self) -> str:
        """Returns the title with the unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def measure(self) -> str:
        """Returns its heading in a table, with the unit."""
        cell = self.table or Shown(self.title, "g")
        return f"{cell.heading}, {self.unit}" if self.unit and cell.factor == 1 else cell.heading

    def of(self, *names: str) -> str:
        """Returns the key of this metric of a benchmark, or of whatever its stars stand for."""
        key = self.key
        for name in names:
            key = key.replace("*", name, 1)
        return key


#: The metrics that a training step writes, in the order in which they are shown.
OF_STEPS = (
    Metric("step", "optimizer step"),
    Metric(
        "reward/mean", "mean reward", progress=Shown("reward", "+.3f"), curve="reward", card=".4g"
    ),
    Metric(
        "reverse_kl", "reverse KL", "nats per token", "reverse_kl", progress=Shown("kl", ".3f"),
        table=Shown("reverse KL (sampled)", ".4f"), sweep=Shown("KL", ".3f"), curve="zero",
        card=".4g",
        note="A sampled estimate: the mean of ln p - ln t over the sampled tokens of a step.",
    ),
    Metric(
        "grad_norm", "gradient norm", "", "grad_norm", progress=Shown("grad", ".2g"),
        table=Shown("gradient norm", ".3g", END_MEDIAN), sweep=Shown("grad norm", ".3g", MEDIAN),
        curve="log", card=".4g",
    ),
    Metric("loss", "loss", curve="linear"),
    Metric("entropy", "student's entropy", "nats", curve="linear", card=".4g"),
    Metric(
        "completions/mean_length", "mean completion length", "tokens", "length",
        progress=Shown("len", ".0f"), table=Shown("length", ".0f"), sweep=Shown("len", ".0f"),
        curve="linear", card=".4g",
    ),
    Metric(
        "completions/truncated_fraction", "truncated completions", "share", "truncated",
        table=Shown("truncated, %", ".1f", factor=100.0), sweep=Shown("cut", ".2f"),
        curve="zero", card=".4g",
    ),
    Metric("completions/stop_fraction", "completions that ended by a stop token", "share"),
    Metric("completions/mean_turns", "turns of a completion", curve="linear", card=".4g"),
    Metric("completions/mean_tool_calls", "tool calls of a completion", curve="zero", card=".4g"),
    Metric(
        "completions/tool_error_fraction", "tool calls that failed", "share", curve="zero",
        card=".4g",
    ),
    Metric("reward/zero_fraction", "tokens with a reward of zero", "share", curve="zero"),
    Metric("reward/std", "standard deviation of rewards"),
    Metric("reward/min", "lowest reward"),
    Metric("reward/max", "highest reward"),
    Metric("reward/p05", "5% quantile of rewards"),
    Metric("reward/p95", "95% quantile of rewards"),
    Metric("log_ratio/mean", "mean log ratio, ln t - ln p", "nats"),
    Metric("log_ratio/min", "lowest log ratio", "nats"),
    Metric("log_ratio/max", "highest log ratio", "nats"),
    Metric("log_ratio/far_fraction", "tokens with a log ratio of 4 nats or more", "share"),
    Metric("select/fraction", "tokens that were selected for the loss", "share"),
    Metric(
        "tail/student", "student's probability outside the teacher's top k", "share", curve="zero"
    ),
    Metric("tail/teacher", "teacher's probability outside its top k", "share", curve="zero"),
    Metric("task_reward/mean", "mean task reward"),
    Metric("feedback/mean_grade", "mean grade of the feedback", curve="linear"),
    Metric(
        "feedback/left_out_fraction", "completions without room for their feedback", "share",
        curve="zero",
    ),
    Metric("sampler/mean_abs_difference", "mean |ln p - ln sampler's p|", "nats"),
    Metric("sampler/effective_sample_size", "effective sample size", "share of the tokens"),
    Metric("rollout/max_new_tokens", "tokens that a completion may have", curve="zero"),
    Metric("rollout/temperature", "sampling temperature", curve="zero"),
    Metric("off_policy/share", "completions that come from a file", "share"),
    Metric("off_policy/mean_weight", "mean importance weight of a file's tokens"),
    Metric("teacher/*/tokens", "tokens of one of several teachers"),
    Metric("teacher/*/reward", "mean reward of one of several teachers"),
    Metric("teacher/*/reverse_kl", "reverse KL to one of several teachers", "nats per token"),
    Metric("teacher/*/share", "part of a teacher in a mixture", "share"),
    Metric("learning_rate", "learning rate"),
    Metric("mfu", "model FLOPs utilisation", "share", curve="linear"),
    Metric(
        "tokens_per_second", "sampled tokens per second",
        progress=Shown("tokens/s", ",.0f", is_unit=True), curve="linear",
    ),
    Metric(
        "seconds/step", "seconds of a step", "s", "seconds",
        progress=Shown("s/step", ".3g", is_unit=True),
        table=Shown("seconds a step", ".3g", MEDIAN), sweep=Shown("s", ".0f", TOTAL),
    ),
    Metric("seconds/*", "seconds of a phase of the step", "s"),
    Metric(
        "memory/peak_bytes", "peak memory so far", "bytes",
        table=Shown("peak memory, GiB", ".2f", LARGEST, factor=2.0**-30),
    ),
    Metric("num_tokens", "trained tokens", table=Shown("trained tokens", ",.0f", TOTAL)),
)  # fmt: skip

#: The metrics of each benchmark, by their names in an evaluation's results.
OF_BENCHMARKS = {
    "avg_at_k": Metric(
        "eval/*/avg_at_k", "Avg@k", progress=Shown("", ".1f", factor=100.0),
        sweep=Shown("Avg@", ".2f", factor=100.0),
    ),
    "pass_at_k": Metric("eval/*/pass_at_k", "Pass@k", sweep=Shown("Pass@", ".2f", factor=100.0)),
    "maj_at_k": Metric("eval/*/maj_at_k", "Maj@k"),
    "mean_length": Metric("eval/*/mean_length", "mean length", "tokens", better="lower"),
    "truncated_fraction": Metric("eval/*/truncated_fraction", "truncated", "share", better="lower"),
}  # fmt: skip

#: The further scores that a grader of one's own gives: of a benchmark, by name.
OF_SCORES = Metric("eval/*/scores/*", "further score")

#: The divergence from the teacher on held-out prompts, by its names in an evaluation's results.
OF_DIVERGENCE = {
    "reverse_kl": Metric(
        "eval/divergence/reverse_kl", "reverse KL on held-out prompts", "nats per token",
        progress=Shown("reverse_kl", ".3g"), table=Shown("held-out KL", ".4f"), curve="zero",
        better="lower",
    ),
    "agreement": Metric(
        "eval/divergence/agreement", "greedy tokens that are the teacher's", "share",
        table=Shown("agreement, %", ".1f", factor=100.0), curve="linear",
    ),
    "teacher_log_prob": Metric(
        "eval/divergence/teacher_log_prob", "teacher's log-prob of the student's tokens",
        "nats per token", table=Shown("teacher's log-prob", ".4f"),
    ),
    "mean_length": Metric(
        "eval/divergence/mean_length", "mean length on held-out prompts", "tokens",
        table=Shown("held-out length", ".1f"), better="lower",
    ),
    "truncated_fraction": Metric(
        "eval/divergence/truncated_fraction", "truncated on held-out prompts", "share",
        table=Shown("held-out truncated, %", ".1f", factor=100.0), better="lower",
    ),
}  # fmt: skip

#: The quality of gradients at both ends of a training, by its dotted keys in gradients.json.
OF_GRADIENTS = tuple(
    Metric(
        f"{when}.gradient_{name}", f"{title} at the {when}", "", f"{name}_{when}",
        table=Shown(f"{title} at the {when}", ".3g") if name == "snr" else None,
        sweep=Shown(f"{short} {when}", ".2f"),
    )
    for name, title, short in (("snr", "gradient SNR", "SNR"), ("cosine", "gradient cosine", "cos"))
    for when in ("start", "end")
)  # fmt: skip


def tracked(row: StepMetrics) -> dict[str, float]:
    """Returns what trackers get of a row: its finite numbers, without the step."""
    return {key: value for key, value in row.items() if value is not None and key != "step"}
