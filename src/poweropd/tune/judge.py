"""What the trials found, and which setting that speaks for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from poweropd.evaluation.divergence import PromptTotals, paired_differences
from poweropd.evaluation.metrics import Estimate, paired_bootstrap
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import END_MEAN, OF_DIVERGENCE, Shown
from poweropd.tune.trials import DECIDING, FACTOR, Trial, at_rate, reward_text

LARGER_SNR = 1.5  # times another's signal-to-noise ratio that is worth a word


@dataclass(frozen=True)
class Finding:
    """The figures of one trial; what was not measured is None.

    value: of the deciding metric. difference: from the recipe's own setting, paired by prompt.
    zero: share of tokens without a reward, at the end. why: why it diverged or is not finished.
    """

    trial: Trial
    value: Estimate | None = None
    difference: Estimate | None = None
    snr: float | None = None
    zero: float | None = None
    why: str = ""

    def to_dict(self) -> JsonObject:
        """Returns the figures under plain names, for JSON."""
        found = asdict(self)
        del found["trial"]
        changes = {key: change.new for key, change in self.trial.changes.items()}
        run = str(self.trial.training.path)
        return {"setting": self.trial.label, "run": run, "changes": changes, **found}


@dataclass(frozen=True)
class Recommendation:
    """The setting to take, and the reason in words."""

    finding: Finding
    reason: str


def measured(trials: Sequence[Trial], metric: str, failed: Mapping[str, str]) -> list[Finding]:
    """Returns the figures of all trials; the first is the recipe's own setting."""
    snr = {
        reward_text(one.training.config): figures["gradient_snr"]
        for one in trials
        for figures in one.training.points().values()
        if "gradient_snr" in figures
    }
    found = list[Finding]()
    for trial in trials:
        run = trial.training
        rows = run.directory.metrics()
        zero = END_MEAN.of(rows, "reward/zero_fraction") if rows else None
        why = run.diverged() or failed.get(run.name, "")
        if not why and not run.is_finished():
            why = f"not finished: {run.progress()[1]}"
        value = None if why else _value(trial, run.steps, metric)
        difference = None
        if value is not None and found and found[0].value is not None:
            difference = difference_of(trial, found[0].trial, metric)
        ratio = snr.get(reward_text(run.config))
        found.append(Finding(trial, value, difference, ratio, zero, why))
    return found


def recommend(findings: Sequence[Finding], metric: str) -> Recommendation | None:
    """Returns the smallest change among those from which the best is not told apart; None if none.

    Two settings are told apart if the interval of their paired difference leaves out zero.
    """
    ahead = _ahead(findings, metric)
    if not ahead:
        return None
    chosen = min(ahead, key=lambda one: one.trial.size)
    return Recommendation(chosen, " ".join(_reasons(findings, ahead, chosen, metric)))


def wider(findings: Sequence[Finding], metric: str) -> list[str]:
    """Returns the overrides of further trials if the best rate may lie beyond those tried so far.

    That is a higher rate if the best is at the highest, or if nothing is told apart from before
    training up to the highest; a lower rate if the best is at the lowest, or if all diverged. The
    rewards that may still be the best are tried there. [] if the best rate has one at either side.
    """
    ahead = _ahead(findings, metric)
    rates = [one.trial.rate for one in findings]
    lowest, highest = min(rates), max(rates)
    if not ahead:
        return _from_rate_to(findings, lowest, lowest / FACTOR)
    best, moved = ahead[0].trial.rate, _moved(findings, ahead[0], metric)
    top = [one for one in ahead if one.trial.rate == highest]
    if best == highest or (top and not moved):
        return _from_rate_to(top, highest, highest * FACTOR)
    if best == lowest and moved:
        return _from_rate_to(ahead, lowest, lowest / FACTOR)
    return []


def difference_of(
    trial: Trial, other: Trial, metric: str, other_step: int | None = None
) -> Estimate:
    """Returns the deciding metric of a trial minus that of another, paired by prompt.

    other_step: of the other's evaluation; the last one if None.
    """
    steps = trial.training.steps, other.training.steps if other_step is None else other_step
    if metric in OF_DIVERGENCE:
        return paired_differences(_prompt_totals(trial, steps[0]), _prompt_totals(other, steps[1]))[
            metric
        ]
    return paired_bootstrap(_solved_of(trial, steps[0]), _solved_of(other, steps[1]))


def format_of(metric: str) -> Shown:
    """Returns how the deciding metric is shown."""
    shown = DECIDING[metric].table or DECIDING[metric].sweep
    if shown is None:
        raise ValueError(f"{metric} has no format in the registry")
    return shown


def value_before(findings: Sequence[Finding], metric: str) -> Estimate | None:
    """Returns the deciding metric before the first step; None if it is not known."""
    return _value(findings[0].trial, 0, metric)


def shown_mean(estimate: Estimate, metric: str) -> str:
    """Returns a value without its interval."""
    shown = format_of(metric)
    return f"{estimate.mean * shown.factor:{shown.format}}"


def shown_estimate(estimate: Estimate, metric: str, sign: str = "") -> str:
    """Returns a value, or a difference if `sign` is "+", with its interval."""
    shown = format_of(metric)
    values = (estimate.mean, estimate.low, estimate.high)
    mean, low, high = (f"{value * shown.factor:{sign}{shown.format}}" for value in values)
    return f"{mean} [{low}, {high}]"


def _ahead(findings: Sequence[Finding], metric: str) -> list[Finding]:
    """Returns the best setting, then those that are not told apart from it; [] without any value.

    Two settings are told apart if the interval of their paired difference leaves out zero.
    """
    values = [(one, one.value.mean) for one in findings if one.value is not None]
    sign = -1 if DECIDING[metric].better == "higher" else 1
    done = [one for one, _ in sorted(values, key=lambda pair: sign * pair[1])]
    return done[:1] + [
        one for one in done[1:] if _spans_zero(difference_of(one.trial, done[0].trial, metric))
    ]


def _moved(findings: Sequence[Finding], best: Finding, metric: str) -> bool:
    """Returns whether the best setting is told apart from the student before training."""
    own = findings[0].trial
    if value_before(findings, metric) is None:
        return True  # nothing is known of before
    return not _spans_zero(difference_of(best.trial, own, metric, other_step=0))


def _spans_zero(difference: Estimate) -> bool:
    return difference.low <= 0 <= difference.high


def _from_rate_to(findings: Sequence[Finding], rate: float, other: float) -> list[str]:
    """Returns the overrides of the settings at a rate, at another one."""
    return [at_rate(one.trial.case, other) for one in findings if one.trial.rate == rate]


def _reasons(
    findings: Sequence[Finding], ahead: Sequence[Finding], chosen: Finding, metric: str
) -> list[str]:
    """Returns the sentences that say why `chosen` is recommended."""
    title, own, best = DECIDING[metric].title, findings[0], ahead[0]
    assert chosen.value is not None
    value, before = shown_estimate(chosen.value, metric), value_before(findings, metric)
    since = "" if before is None else f", {shown_estimate(before, metric)} before training"
    texts = [f"{chosen.trial.label}: {title} {value}{since}."]
    if chosen is own:
        others = len(ahead) - 1
        texts.append(
            f"No difference seen from {best.trial.label}, which has the best value: the recipe "
            "stays as it is."
            if best is not own
            else "Nothing that was tried is better than the recipe as it is."
            + (f" No difference seen from {others} other settings." if others else "")
        )
    elif own.value is None:
        texts.append(f"The recipe's own setting has no value ({own.why}).")
    else:
        assert chosen.difference is not None
        texts.append(
            f"That is {shown_estimate(chosen.difference, metric, '+')} from the recipe's own "
            f"setting ({own.trial.label}), paired by prompt."
        )
    if chosen is not best and chosen is not own:
        texts.append(
            f"No difference seen from {best.trial.label}, which has the best value and changes "
            "more."
        )
    rates = [one.trial.rate for one in findings]
    ends = {max(rates): "higher", min(rates): "lower"} if len(set(rates)) > 1 else {}
    if not _moved(findings, best, metric):
        texts.append("No difference seen from before training: try more --steps or higher --rates.")
    elif best.trial.rate in ends:
        texts.append(
            "The best value is at an end of the rates that were tried: --rates can try "
            f"{ends[best.trial.rate]} ones."
        )
    lost = [one.trial.label for one in findings if one.trial.training.diverged()]
    if lost:
        texts.append(f"Diverged: {'; '.join(lost)}.")
    return texts + _snr_reason(ahead, chosen)


def _snr_reason(ahead: Sequence[Finding], chosen: Finding) -> list[str]:
    """Returns a sentence if another setting that is as good has a much cleaner gradient."""
    known = [one for one in ahead if one.snr is not None]
    clearest = max(known, key=lambda one: one.snr or 0.0, default=chosen)
    if chosen.snr is None or clearest.snr is None or clearest.snr < LARGER_SNR * chosen.snr:
        return []
    return [
        f"The gradient of {clearest.trial.label} has {clearest.snr / max(chosen.snr, 1e-9):.1f} "
        "times its signal-to-noise ratio: a longer run may show a difference that these steps do "
        "not."
    ]


def _value(trial: Trial, step: int, metric: str) -> Estimate | None:
    """Returns the deciding metric of a trial's evaluation at a step; None if there is none."""
    directory = trial.training.directory
    if metric in OF_DIVERGENCE:
        found = directory.divergence(step).get(metric)
        return None if found is None else Estimate(**found)
    results = list(directory.evaluation(step).values())
    if not results:
        return None
    estimates = [Estimate(**result[metric]) for result in results]
    sums = [sum(asdict(one)[part] for one in estimates) for part in ("mean", "low", "high")]
    return Estimate(*(total / len(results) for total in sums))


def _prompt_totals(trial: Trial, step: int) -> dict[str, PromptTotals]:
    found: dict[str, PromptTotals] = trial.training.directory.divergence_facts(step)["per_prompt"]
    return found


def _solved_of(trial: Trial, step: int) -> dict[str, float]:
    results = trial.training.directory.evaluation(step)
    return {f"{name}/{id}": v for name in results for id, v in results[name]["solved"].items()}
