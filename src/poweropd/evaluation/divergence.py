"""The figures of how far a student is from its teacher, each with an interval over prompts.

Every figure is a sum over completions divided by another: the reverse KL, say, by the number of
tokens. Intervals come from resampling prompts, each with both of its sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypedDict

from poweropd.evaluation.intervals import Estimate, estimate_ratio, paired_ratios

#: How the reverse KL was measured: over the whole vocabulary of each context, or from the tokens.
EXACT, SAMPLED = "exact", "sampled"
#: The name of its rows' file, and in the keys of its metrics.
DIVERGENCE = "divergence"


class JudgedRow(TypedDict):
    """One completion, as its teacher judged it: a line of divergence.jsonl.

    The last three numbers are sums over the judged tokens, which are those that the student wrote.
    All stop tokens count as one: that a completion ends is judged, and not by which of them.
    """

    id: str  # of the prompt
    sample: int  # which of the n completions of this prompt it is
    completion: str
    length: int  # its tokens, with the stop token
    stop: str | None  # the stop token; None if the completion is truncated
    tokens: int  # the judged ones
    reverse_kl: float  # nats; sampled, ln p_student - ln p_teacher of the token
    agreement: int  # contexts in which both models have the same most probable token
    teacher_log_prob: float  # nats


class PromptTotals(TypedDict):
    """The sums over the completions of one prompt."""

    completions: int
    tokens: int
    reverse_kl: float
    agreement: int
    teacher_log_prob: float
    length: int
    truncated: int


class _Ratio(NamedTuple):
    """A figure: one of a prompt's sums over another; a `fraction` lies in [0, 1]."""

    above: str
    below: str
    fraction: bool = False


#: Name of the figure -> what it is made of; `OF_DIVERGENCE` of runs/metrics.py has their titles.
_RATIOS = {
    "reverse_kl": _Ratio("reverse_kl", "tokens"),
    "agreement": _Ratio("agreement", "tokens", fraction=True),
    "teacher_log_prob": _Ratio("teacher_log_prob", "tokens"),
    "mean_length": _Ratio("length", "completions"),
    "truncated_fraction": _Ratio("truncated", "completions", fraction=True),
}


@dataclass(frozen=True)
class Divergence:
    """The figures of an evaluation of `prompts` prompts with `n` completions each.

    estimate: EXACT or SAMPLED, of the reverse KL; figures: by the names of `OF_DIVERGENCE`.
    per_prompt: prompt id -> its sums, by which two evaluations are compared.
    """

    estimate: str
    prompts: int
    n: int
    tokens: int  # judged, in all
    figures: dict[str, Estimate]
    per_prompt: dict[str, PromptTotals]

    def to_dict(self) -> dict[str, object]:
        """Returns what a results.json or the file of --json holds of it."""
        found = asdict(self)
        return {DIVERGENCE: found.pop("figures"), **found}


def summarize_divergence(rows: Sequence[JudgedRow], estimate: str) -> Divergence:
    """Returns the figures of all rows, in any order; raises ValueError if no token was judged."""
    per_prompt: dict[str, PromptTotals] = {}
    for row in sorted(rows, key=lambda row: (row["id"], row["sample"])):
        own = per_prompt.setdefault(row["id"], _nothing())
        own["completions"] += 1
        own["truncated"] += row["stop"] is None
        own["tokens"] += row["tokens"]
        own["length"] += row["length"]
        own["reverse_kl"] += row["reverse_kl"]
        own["agreement"] += row["agreement"]
        own["teacher_log_prob"] += row["teacher_log_prob"]
    parts = {name: _parts(per_prompt, ratio) for name, ratio in _RATIOS.items()}
    figures = {
        name: estimate_ratio(*zip(*pairs.values(), strict=True), fraction=_RATIOS[name].fraction)
        for name, pairs in parts.items()
    }
    tokens = sum(own["tokens"] for own in per_prompt.values())
    n = max(own["completions"] for own in per_prompt.values())
    return Divergence(estimate, len(per_prompt), n, tokens, figures, per_prompt)


def paired_differences(
    a: Mapping[str, PromptTotals], b: Mapping[str, PromptTotals]
) -> dict[str, Estimate]:
    """Returns each figure's difference a - b, paired by prompt; raises ValueError if ids differ."""
    return {
        name: paired_ratios(_parts(a, ratio), _parts(b, ratio)) for name, ratio in _RATIOS.items()
    }


def _nothing() -> PromptTotals:
    return PromptTotals(
        completions=0, tokens=0, reverse_kl=0.0, agreement=0, teacher_log_prob=0.0, length=0,
        truncated=0,
    )  # fmt: skip


def _parts(per_prompt: Mapping[str, PromptTotals], ratio: _Ratio) -> dict[str, tuple[float, float]]:
    """Returns prompt id -> the two sums that a figure is made of."""
    numbers: dict[str, dict[str, float]] = {i: dict(own) for i, own in per_prompt.items()}  # type: ignore[arg-type]
    return {i: (own[ratio.above], own[ratio.below]) for i, own in numbers.items()}
