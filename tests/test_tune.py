"""`poweropd tune`: what it tries, its real trials (stopped, diverged), and what it recommends."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from poweropd import Config, commands
from poweropd.errors import RunError, UsageError
from poweropd.evaluation.divergence import JudgedRow, summarize_divergence
from poweropd.runs.directory import RunDirectory
from poweropd.sweep import process, runner
from poweropd.sweep.jobs import Training
from poweropd.training.trainer import Trainer
from poweropd.tune import command, judge, tuned_recipe
from poweropd.tune.trials import Change, Search, Trial, trials

MAKES = Callable[..., Config]
OWN = "reward.alpha=3"
SMALL = ("--steps", "2", "--snr", "0", "--alphas", "3", "--case", OWN)


@pytest.fixture
def recipe_file(recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small recipe with 64 prompts, at power alpha 3."""
    config = recipe(**{"train.steps": 9, "reward": {"name": "power", "alpha": 3.0}})
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    text = config.to_yaml().replace("  alpha: 3.0", "  alpha: 3.0  # as of old")
    path.write_text("# My task.\n" + text)
    return path


def tune(recipe: Path, *options: str) -> Any:
    """The command, in this process; its trials have their own."""
    arguments = ["tune", str(recipe), *options]
    return typer.main.get_command(commands.app)(arguments, standalone_mode=False)


def test_rewards_times_rates_are_tried_the_recipes_own_first(recipe_file: Path) -> None:
    search = Search(alphas=[3, 50], cases=["reward.name=clip"])
    found, held_out = trials(recipe_file, [], search, Path("out"))
    assert [trial.label for trial in found] == [
        "power, alpha 3, at 0.001",
        "power, alpha 50, at 0.001",
        "clip, at 0.001",
        "power, alpha 3, at 0.004",
        "power, alpha 50, at 0.004",
        "clip, at 0.004",
    ]
    assert held_out == 6  # a tenth of the prompts
    own, other = found[0].training, found[1].training
    assert (own.steps, own.config.data.holdout) == (32, 6)
    assert own.config.evaluate is not None
    assert own.config.evaluate.before
    assert other.config.evaluate is not None
    assert not other.config.evaluate.before
    assert [one.batches for trial in found for one in trial.training.measurements] == [8, 8, 8]
    assert found[0].size == (0, 0) < found[1].size < found[4].size
    of_clip, _ = trials(recipe_file, ["reward={name: clip}"], Search(rates=[1e-4]), Path("out"))
    assert [trial.label for trial in of_clip][:2] == [
        "clip, at 0.001",
        "power, alpha 0.5, at 0.001",
    ]
    assert of_clip[-1].label == "log_ratio, at 0.0001"
    of_vanilla, _ = trials(recipe_file, ["reward={name: log_ratio}"], Search(), Path("out"))
    assert len({trial.label for trial in of_vanilla}) == len(of_vanilla) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alphas", "1,x"], "--alphas: expected numbers above 0, separated by commas, got 1,x"),
        (["--rates", "0"], "--rates: expected numbers above 0, separated by commas, got 0"),
        (["--snr", "1"], "--snr: expected 0 or at least 2 batches, got 1"),
        (["--metric", "loss"], "--metric: expected one of reverse_kl, "),
        (["--metric", "avg_at_k"], "avg_at_k needs evaluate.benchmarks in the recipe"),
        (["--case", "reward.name=clap"], "--case 'reward.name=clap train.learning_rate=0.001': "),
        (["run.dir=x"], "run.dir: a sweep names its runs' directories"),
    ],
)
def test_mistakes_are_one_line(recipe_file: Path, options: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        tune(recipe_file, *options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("runs").exists()


def test_too_few_prompts_to_hold_any_out(recipe_file: Path) -> None:
    Path("few.jsonl").write_text('{"problem": "1+2"}\n' * 9)
    with pytest.raises(UsageError, match=r"data\.prompts: 9 prompts are too few to hold any out"):
        tune(recipe_file, "data.prompts=few.jsonl")


def test_a_dry_run_says_what_it_costs(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(recipe_file, *SMALL, "--dry-run")
    said = capsys.readouterr().out
    assert "2 runs are left: 4 optimizer steps, 28 completions, at most 336 tokens" in said
    assert "Memory: " in said
    assert "one 4 times as high or low is tried, too" in said
    assert not Path("runs").exists()


class Here(runner.JobRunner):
    """Runs the jobs in this process, which takes no time to begin, up to a signal."""

    def run(self) -> runner.SweepOutcome:
        for job in self.waiting:
            assert isinstance(job, Training)
            wanted = job.directory.config_path, job.measurements, job.trial
            result = process.train_and_measure(*wanted)
            if result.interrupted_by is not None:
                left = [one.name for one in self.jobs if not one.is_finished()]
                return runner.SweepOutcome(unfinished=left, interrupted_by=result.interrupted_by)
        return runner.SweepOutcome()


@pytest.fixture(autouse=True)
def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are trained in this process; tests of the sweep start and kill real ones."""
    monkeypatch.setattr(runner, "JobRunner", Here)


@pytest.mark.thorough
def test_trials_are_stopped_go_on_and_may_diverge(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SMALL, "--rates", "1e30", "data.holdout=8"]
    out = Path("runs/small-tune")
    first = out / "alpha=3-learning_rate=0.001-seed42"

    step = Trainer.step

    def stopped_step(trainer: Trainer, number: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, number)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopped_step)
        assert tune(recipe_file, *options) == 128 + signal.SIGINT
    assert RunDirectory(first).steps_done() == 1
    assert not (out / "recommended.yaml").exists()
    capsys.readouterr()
    assert not tune(recipe_file, *options)
    said = capsys.readouterr().out
    assert "2 settings of " in said
    assert " left: " in said
    assert re.search(r"at 1e\+30: .*not finite", said), said
    assert "poweropd train runs/small-tune/recommended.yaml run.dir=runs/small" in said
    found = json.loads((out / "tune.json").read_text())
    assert found["recommended"] == "power, alpha 3, at 0.001"
    own, lost = found["trials"]
    assert own["value"]["low"] <= own["value"]["mean"] <= own["value"]["high"]
    assert lost["value"] is None
    assert "not finite" in lost["why"]
    assert not list(out.rglob("*.safetensors"))
    text = (out / "recommended.yaml").read_text()
    assert text.startswith("# poweropd tune: power, alpha 3, at 0.001: reverse KL")
    assert "# as of old" in text
    assert Config.load(out / "recommended.yaml").data.holdout == 8

    (out / "recommended.yaml").unlink()
    assert not tune(recipe_file, *options)  # nothing is run a second time
    assert "Every run is finished" in capsys.readouterr().out
    assert (out / "recommended.yaml").read_text() == text


@pytest.mark.thorough
def test_further_rates_are_tried_by_themselves_and_not_twice(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All diverge at the first two rates, and the same command goes on where it was."""
    options = [*SMALL, "train.learning_rate=1e30", "data.holdout=8"]
    monkeypatch.setattr(command, "WIDER", 1)
    assert not tune(recipe_file, *options)
    said = capsys.readouterr().out
    assert "The best rate may lie beyond" in said
    assert "Time: about " in said
    assert "at 2.5e+29: " in said
    assert "Every setting diverged: name lower learning rates by --rates" in said
    assert not Path("runs/small-tune/recommended.yaml").exists()
    last = "alpha=3-learning_rate=2.5e+29-seed42"
    shutil.rmtree(f"runs/small-tune/{last}")
    stopped = runner.SweepOutcome(unfinished=[last], interrupted_by=signal.SIGINT)
    monkeypatch.setattr(Here, "run", lambda self: stopped)
    assert tune(recipe_file, *options) == 128 + signal.SIGINT
    assert "1 run is left: 2 optimizer steps" in capsys.readouterr().out


def test_a_disk_that_is_full_is_one_line(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = runner.SweepOutcome({"a": "no space"}, ["a", "b"], disk_full=True)
    monkeypatch.setattr(Here, "run", lambda self: full)
    with pytest.raises(RunError, match="the disk is full: 2 of 2 runs are not finished") as raised:
        tune(recipe_file, *SMALL)
    assert "\n" not in str(raised.value)


def judged(trial: Trial, step: int, values: Mapping[str, float]) -> None:
    """Writes an evaluation with these reverse KLs by prompt, one token each."""
    rows = [
        JudgedRow(
            id=prompt, sample=0, completion="", length=1, stop="", tokens=1, reverse_kl=value,
            agreement=1, teacher_log_prob=-1.0,
        )
        for prompt, value in values.items()
    ]  # fmt: skip
    folder = trial.training.directory.evaluation_folder(step)
    folder.mkdir(parents=True)
    content = {"results": {}, **summarize_divergence(rows, "exact").to_dict()}
    (folder / "results.json").write_text(json.dumps(content))


def findings_of(
    found: list[Trial], kls: list[list[float]], before: list[float]
) -> list[judge.Finding]:
    """The findings from the held-out reverse KLs of the trials, by prompt; of none, it is lost."""
    for trial, values in zip(found, kls, strict=True):
        shutil.rmtree(trial.training.path, ignore_errors=True)
        RunDirectory.open(trial.training.config)
        if values:
            judged(trial, 2, {str(number): value for number, value in enumerate(values)})
        else:
            trial.training.directory.end_trial("it is lost")
    judged(found[0], 0, {str(number): value for number, value in enumerate(before)})
    return judge.measured(found, "reverse_kl", {})


SMALLER = "train.learning_rate=0.00025"
BEFORE = [7.0, 8, 9, 9]
LOW, MIDDLE, HIGH = [2.0, 3, 4, 5], [3.0, 4, 5, 6.1], [5.0, 6, 7, 7.9]


def test_the_smallest_change_that_the_figures_allow(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("poweropd.sweep.jobs.Training.is_finished", lambda self: True)
    search = Search(alphas=[6, 50], rates=[1e-3], steps=2, batches=0, cases=[OWN])
    found, _ = trials(recipe_file, [], search, Path("out"))

    def best(kls: list[list[float]]) -> tuple[str, str]:
        chosen = judge.recommend(findings_of(found, kls, BEFORE), "reverse_kl")
        assert chosen is not None
        return chosen.finding.trial.label, chosen.reason

    label, reason = best([[2, 3, 4, 5], [5, 2, 4, 2], [3, 4, 2, 4]])  # all are alike
    assert "alpha 3" in label
    assert "the recipe stays as it is" in reason
    # Both others are better and alike: the smaller change is taken, not the best value.
    label, reason = best([[2, 3, 4, 5], [1, 2, 2.9, 4.1], [0.9, 2, 3, 3.9]])
    assert "alpha 6" in label
    assert "No difference seen from power, alpha 50, at 0.001, which has the best value" in reason
    # One is better than all others, by less than any of these intervals is wide.
    label, reason = best([[2, 3, 4, 5], [2, 3, 4, 4.9], [1, 2, 3, 4]])
    assert "alpha 50" in label
    assert "paired by prompt" in reason
    _, reason = best([BEFORE, HIGH, []])
    assert "Diverged: power, alpha 50" in reason
    _, reason = best([BEFORE, BEFORE, BEFORE])
    assert "No difference seen from before training: try more --steps or higher --rates" in reason


def test_a_further_rate_is_tried_where_the_best_may_be(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("poweropd.sweep.jobs.Training.is_finished", lambda self: True)
    search = Search(alphas=[3], rates=[4e-3, 1.6e-2], steps=2, batches=0, cases=[OWN])
    found, _ = trials(recipe_file, [], search, Path("out"))

    def further(kls: list[list[float]]) -> list[str]:
        return judge.wider(findings_of(found, kls, BEFORE), "reverse_kl")

    higher, lower = ["reward.alpha=3 train.learning_rate=0.064"], ["reward.alpha=3 " + SMALLER]
    assert further([HIGH, LOW, MIDDLE]) == []
    assert further([MIDDLE, LOW, []]) == []  # the highest rate is lost
    assert further([HIGH, MIDDLE, LOW]) == higher
    assert further([LOW, MIDDLE, []]) == lower
    assert further([[], [], []]) == lower
    # Nothing moves at any of them: the best is at the lowest by chance.
    assert further([[7, 8.1, 8.9, 9], BEFORE, [7.1, 8, 9, 8.95]]) == higher
    more, _ = trials(recipe_file, [], search, Path("out"), higher)
    assert [trial.rate for trial in more] == [1e-3, 4e-3, 1.6e-2, 6.4e-2]
    clip = Search(alphas=[3], cases=["train.learning_rate=1 reward.name=clip"], rates=[4e-3])
    found, _ = trials(recipe_file, [], clip, Path("out"))
    assert [(trial.case, trial.rate) for trial in found] == [
        ("reward.alpha=3", 1e-3),
        ("reward.name=clip", 1),
        ("reward.alpha=3", 4e-3),
    ]


def test_a_tuned_recipe_keeps_comments_and_drops_the_old_rewards_parameters(
    recipe_file: Path,
) -> None:
    changes = {
        "reward.name": Change("power", "clip"),
        "reward.alpha": Change(3.0, None),
        "train.learning_rate": Change(1e-3, 4e-3),
    }
    path = recipe_file.parent / "recommended.yaml"
    tuned_recipe.write_tuned(recipe_file, ["train.steps=7"], changes, 6, "It is so.", path)
    text = path.read_text()
    assert text.startswith("# poweropd tune: It is so.\n# My task.\n")
    config = Config.load(path)
    assert config.reward.model_dump() == {"name": "clip", "low": -1.0, "high": 1.0}
    assert (config.train.learning_rate, config.train.steps) == (4e-3, 7)
    assert config.data.holdout == 6
    assert text.count("# set by poweropd tune") == 3
