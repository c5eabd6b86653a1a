"""What `poweropd tune` does: says the cost, runs the trials, recommends, writes the recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from poweropd.runs.files import write_json
from poweropd.sweep import command, cost, runner
from poweropd.sweep.runner import SweepOutcome
from poweropd.terminal import make_console, print_line
from poweropd.tune import judge
from poweropd.tune.judge import Finding, Recommendation
from poweropd.tune.trials import DECIDING, FACTOR, Search, Trial, trials
from poweropd.tune.tuned_recipe import write_tuned

RESULTS, RECIPE = "tune.json", "recommended.yaml"
WIDER = 4  # times that further rates are tried by themselves


def run_tune(
    recipe: Path,
    overrides: Sequence[str],
    search: Search,
    out: Path,
    parallel: int,
    dry_run: bool,
) -> int:
    """Runs what is not finished, prints the figures and the recommendation; returns the status.

    Raises RunError, after the table, if a trial failed for another reason than that it diverged.
    """
    console = make_console()
    found, held_out = trials(recipe, overrides, search, out)
    if held_out:
        print_line(
            console,
            f"data.holdout: {held_out} prompts are kept out of training, for the recipe has none; "
            "the recommended recipe keeps them out, too.",
        )
    if dry_run:
        command.print_trainings([trial.training for trial in found], parallel)
        print_line(console, _may_follow(search))
        return 0
    print_line(console, f"{len(found)} settings of {recipe}, {search.steps} steps each, in {out}:")
    more = list[str]()
    with runner.only_sweep(out) as lock:
        for left in reversed(range(1 if search.rates else 1 + WIDER)):
            seen = all(trial.training.is_finished() for trial in found)  # by an earlier command
            outcome = _run_left(console, found, search, out, lock, parallel)
            findings = judge.measured(found, search.metric, outcome.failed)
            if outcome.unfinished:
                _show(console, findings, search)
                return command.exit_status(out, outcome, len(found))
            further = judge.wider(findings, search.metric) if left else []
            if not further:
                break
            if not seen:
                _show(console, findings, search)
            print_line(console, "The best rate may lie beyond those that were tried, so also:")
            more += further
            found, _ = trials(recipe, overrides, search, out, more)
        _show(console, findings, search)
        best = judge.recommend(findings, search.metric)
        target = out / RECIPE
        if best is not None:
            changes = best.finding.trial.changes
            write_tuned(recipe, overrides, changes, held_out, best.reason, target)
        write_json(out / RESULTS, _tune_json(findings, best, search, target))
    _tell_recommendation(console, best, out, recipe.stem)
    return 0


def _run_left(
    console: Console,
    found: Sequence[Trial],
    search: Search,
    out: Path,
    lock: IO[str],
    parallel: int,
) -> SweepOutcome:
    """Says which trials are left and what they cost, and runs them."""
    trainings = [trial.training for trial in found]
    left = [trial for trial in found if not trial.training.is_finished()]
    for trial in left:
        print_line(console, f"  {trial.label}")
    for line in cost.cost_lines(trainings, parallel):
        print_line(console, line)
    if not left:
        return SweepOutcome()
    runner.claim(out, trainings, {"snr": search.batches}, among_others=True)
    return runner.JobRunner(trainings, parallel, lock).run()


def _may_follow(search: Search) -> str:
    """Returns what a dry run says about rates that depend on figures."""
    if search.rates:
        return "No other rates are tried, for --rates names them."
    return (
        f"If the best of these is at an end of the rates, one {FACTOR:g} times as high or low is "
        f"tried, too, with the rewards that may be the best; this goes on up to {WIDER} times."
    )


def _show(console: Console, findings: Sequence[Finding], search: Search) -> None:
    """Prints the table, and why a setting has no figures."""
    console.print(findings_table(findings, search))
    for finding in findings:
        if finding.why:
            print_line(console, f"{finding.trial.label}: {finding.why}")


def findings_table(findings: Sequence[Finding], search: Search) -> Table:
    """Returns the figures of all trials, the recipe's own setting first."""
    metric, shown = DECIDING[search.metric], judge.format_of(search.metric)
    found = Table(
        caption=f"{metric.heading}, {metric.better} is better, and its difference from the "
        "recipe's own setting, paired by prompt [95% interval]. SNR: of the gradient at the start. "
        "No reward: share of the tokens whose reward is zero.",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
    )
    found.add_column("reward", overflow="fold", min_width=16)
    for name in ("rate", shown.heading, "minus the recipe's", "SNR", "no reward"):
        found.add_column(name, justify="right", no_wrap=name not in (shown.heading, "no reward"))
    before = judge.value_before(findings, search.metric)
    if before is not None:
        found.add_row("before training", "", judge.shown_mean(before, search.metric))
    for one in findings:
        value = "–" if one.value is None else judge.shown_mean(one.value, search.metric)
        difference = (
            ""
            if one.difference is None
            else judge.shown_estimate(one.difference, search.metric, "+")
        )
        if one.trial.training.diverged():
            value = "diverged"
        snr = "" if one.snr is None else f"{one.snr:.2f}"
        zero = "" if one.zero is None else f"{one.zero:.0%}"
        found.add_row(one.trial.reward, f"{one.trial.rate:g}", value, difference, snr, zero)
    return found


def _tune_json(
    findings: Sequence[Finding], best: Recommendation | None, search: Search, target: Path
) -> Mapping[str, object]:
    """Returns what tune.json holds."""
    return {
        "metric": search.metric,
        "steps": search.steps,
        "trials": [finding.to_dict() for finding in findings],
        "recommended": None if best is None else best.finding.trial.label,
        "reason": None if best is None else best.reason,
        "recipe": None if best is None else str(target),
    }


def _tell_recommendation(
    console: Console, best: Recommendation | None, out: Path, name: str
) -> None:
    """Prints what is recommended and where it is."""
    if best is None:
        print_line(console, "Every setting diverged: name lower learning rates by --rates.")
    else:
        print_line(console, f"Recommended: {best.reason}")
        print_line(console, f"to train by it: poweropd train {out / RECIPE} run.dir=runs/{name}")
    print_line(console, f"figures: {out / RESULTS}")
