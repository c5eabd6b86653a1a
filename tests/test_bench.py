"""`poweropd bench`: what it compares, how rates are chosen, real trainings, and the tables."""

import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from poweropd import Config, commands, rewards
from poweropd.config.data import DataConfig
from poweropd.config.shipped import shipped_recipe
from poweropd.config.teachers import TeacherConfig
from poweropd.embedded import task
from poweropd.errors import UsageError
from poweropd.evaluation.divergence_command import ModelOptions, measure_divergence
from poweropd.evaluation.intervals import paired_ratios_over_seeds, ratio_over_seeds
from poweropd.evaluation.settings import DivergenceSettings
from poweropd.runs.directory import RunDirectory
from poweropd.sweep import process, runner
from poweropd.sweep.bench import trials
from poweropd.sweep.bench.controls import damped
from poweropd.sweep.bench.settings import BASELINE, PLAIN, QUESTIONS, SETTINGS
from poweropd.sweep.forgetting import divergence_from_start
from poweropd.sweep.jobs import Measurement, Series, Training
from poweropd.training.trainer import Trainer

MAKES = Callable[..., Config]
SMALL = ("--only", "log_ratio,full_vocab", "--seeds", "2")


class Here(runner.JobRunner):
    """Runs the trainings in this process, which takes no time to begin, up to a signal."""

    def run(self) -> runner.SweepOutcome:
        outcome = runner.SweepOutcome()
        for job in self.waiting:
            assert isinstance(job, Series)
            for one in job.trainings:
                wanted = one.directory.config_path, one.measurements, one.trial
                outcome.interrupted_by = process.train_and_measure(*wanted).interrupted_by
                if outcome.interrupted_by is not None:
                    return outcome
        return outcome


@pytest.fixture
def recipe_file(
    recipe: MAKES, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A small recipe with a benchmark, whose trainings run here and try no further rates."""
    monkeypatch.setattr(runner, "JobRunner", Here)
    monkeypatch.setattr(trials, "WIDER", 0)
    monkeypatch.chdir(tmp_path)
    evaluate = {"benchmarks": ["embedded"], "limit": 4, "max_new_tokens": 12, "teacher": True}
    config = recipe(**{"train.steps": 2, "data.holdout": 8, "evaluate": evaluate})
    path = tmp_path / "small.yaml"
    path.write_text(config.to_yaml())
    return path


def bench(recipe: Path, *options: str) -> Any:
    arguments = ["bench", str(recipe), *options]
    return typer.main.get_command(commands.app)(arguments, standalone_mode=False)


def found(recipe: Path) -> dict[str, Any]:
    return json.loads((recipe.parent / "runs/small-bench/bench.json").read_text())


def test_every_setting_is_a_configuration_of_its_own_and_every_question_about_two() -> None:
    path = shipped_recipe("bench.yaml")
    texts = set()
    for own in SETTINGS.values():
        config = Config.load(path, [*PLAIN, *own])
        texts.add(f"{config.reward.model_dump()} {config.objective.model_dump()}")
        assert config.reward.create()
    assert len(texts) == len(SETTINGS)
    assert next(iter(SETTINGS)) == BASELINE
    assert all(q.first in SETTINGS and q.second in SETTINGS for q in QUESTIONS)
    names = {Config.load(path, own).reward.name for own in SETTINGS.values()}
    # By default tsallis is hellinger, and extrapolate needs a reference model.
    assert set(rewards.REWARDS) - names == {"tsallis", "extrapolate"}


def test_power_is_its_bound_times_its_damping() -> None:
    """tanh at 2 / alpha is (t^a - p^a) / (t^a + p^a), and `damped` d max(t, p)^a; in float64."""
    generator = np.random.default_rng(0)
    t, p = generator.uniform(0.01, 1, (2, 200))
    teacher, student = torch.tensor(t).log(), torch.tensor(p).log()
    alpha = 5.0
    bound = rewards.create("tanh", temperature=2 / alpha)(teacher, student)
    assert torch.allclose(
        bound.double(), torch.tensor((t**alpha - p**alpha) / (t**alpha + p**alpha)), atol=1e-6
    )
    expected = np.maximum(t, p) ** alpha * np.log(t / p)
    assert torch.allclose(damped(teacher, student, alpha), torch.tensor(expected))


def test_the_rate_is_the_best_one_with_others_at_either_side() -> None:
    assert trials.first_rates(1e-5) == [1e-5, 3e-5]
    assert trials.further_rate({1e-5: 2.0, 3e-5: 1.0}) == 9e-5
    assert trials.further_rate({1e-5: 1.0, 3e-5: 2.0}) == 3.33e-6
    assert trials.further_rate({1e-5: 2.0, 3e-5: 1.0, 9e-5: 1.5}) is None
    assert trials.further_rate({1e-5: math.inf, 3e-5: math.inf}) == 3.33e-6
    assert trials.further_rate({float(i): 9.0 - i for i in range(1, 7)}) is None  # enough
    assert trials.best_rate({1e-5: 2.0, 3e-5: 1.0, 9e-5: math.inf}) == 3e-5
    assert trials.best_rate({1e-5: math.inf}) is None


def test_ratios_over_seeds_draw_seeds_and_prompts() -> None:
    """Against all draws of 2 seeds and 3 prompts with replacement, which are equally likely."""
    totals = np.array([[1.0, 5, 2], [2, 9, 7]])
    counts = np.array([[2.0, 3, 4], [1, 5, 6]])
    others = totals[::-1] * [0.5, 1.0, 2.0]
    ratios, differences = [], []
    for seeds in itertools.product(range(2), repeat=2):
        for prompts in itertools.product(range(3), repeat=3):
            part = np.ix_(seeds, prompts)
            ratios.append(totals[part].sum() / counts[part].sum())
            differences.append(ratios[-1] - others[part].sum() / counts[part].sum())
    alone = ratio_over_seeds(totals, counts, resamples=20_000)
    pair = paired_ratios_over_seeds((totals, counts), (others, counts), resamples=20_000)
    for estimate, exact in ((alone, ratios), (pair, differences)):
        assert np.mean(np.array(exact) < estimate.low - 1e-9) <= 0.035
        assert np.mean(np.array(exact) < estimate.low + 1e-9) >= 0.015
        assert np.mean(np.array(exact) > estimate.high + 1e-9) <= 0.035
        assert np.mean(np.array(exact) > estimate.high - 1e-9) >= 0.015
    assert alone.mean == pytest.approx(26 / 21)
    assert pair.mean == pytest.approx(26 / 21 - others.sum() / 21)
    same = paired_ratios_over_seeds((totals, counts), (totals, counts))
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="pairs of one shape"):
        paired_ratios_over_seeds((totals, counts), (totals[:1], counts[:1]))
    with pytest.raises(ValueError, match="above 0"):
        ratio_over_seeds(totals, 0 * counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "vanilla"], "--only: expected names of log_ratio, clip, "),
        (["--case", "reward.name=clap"], "--case reward.name=clap: override reward.name: "),
        (["--case", "reward.alpha=0"], "--case reward.alpha=0: "),
        (["--case", "reward.name=log_ratio"], "log_ratio is compared already"),
        (["--snr", "1"], "--snr: expected 0 or at least 2 batches, got 1"),
        (["--metric", "loss"], "--metric: expected reverse_kl or avg_at_k, got loss"),
        (["--metric", "avg_at_k", "evaluate=null"], "--metric: avg_at_k needs evaluate.benchmarks"),
        (["--other", "none/such.jsonl"], "--other: none/such.jsonl: no such file or folder"),
        (["run.dir=x"], "run.dir: a bench names its runs' directories; use --out"),
        (["train={epochs: 1}"], "train.epochs: a bench knows its steps beforehand"),
    ],
)
def test_mistakes_are_one_line(recipe_file: Path, options: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        bench(recipe_file, "--only=log_ratio", *options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("runs").exists()


def test_a_case_is_compared_beside_the_others(recipe_file: Path) -> None:
    case = ["reward.name=power reward.alpha=9", "objective.kind=full_vocab"]
    settings, _ = trials.chosen_settings(recipe_file, ["reward={name: tanh}"], ["clip"], case)
    assert list(settings) == ["clip", "power alpha=9", "full_vocab"]
    whole = Config.load(recipe_file, ["reward={name: tanh}", *PLAIN, *settings["full_vocab"]])
    assert (whole.reward.name, whole.objective.kind) == ("tanh", "full_vocab")


def test_what_a_served_teacher_cannot_do_is_left_out(recipe_file: Path) -> None:
    served = ["teacher.servers=[http://127.0.0.1:9]"]
    settings, left_out = trials.chosen_settings(recipe_file, served, [], [])
    assert set(left_out) == {"value baseline", "teachable", "full_vocab", "full_vocab power 500"}
    assert set(settings) | set(left_out) == set(SETTINGS)
    with pytest.raises(UsageError, match="--only full_vocab: "):
        trials.chosen_settings(recipe_file, served, ["full_vocab"], [])


def test_a_dry_run_says_what_it_costs(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(recipe_file, *SMALL, "--dry-run")
    said = capsys.readouterr().out
    assert "8 runs are left: 16 optimizer steps" in said  # two settings, two rates, two seeds
    assert "Rates 3 times as high or low follow" in said
    assert not Path("runs").exists()


@pytest.mark.thorough
def test_a_bench_is_stopped_goes_on_and_answers(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--snr", "2", "--series", "2", "--other", "embedded:other"]
    step = Trainer.step

    def stopped_step(trainer: Trainer, number: int) -> Any:
        if trainer.config.train.seed == 44:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, number)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopped_step)
        assert bench(recipe_file, *options) == 128 + signal.SIGINT
    assert [row["seeds"] for row in found(recipe_file)["rows"]] == [[43], [43]]
    assert not bench(recipe_file, *options)
    content = found(recipe_file)
    rows = {row["setting"]: row for row in content["rows"]}
    assert list(rows) == ["log_ratio", "full_vocab"]
    for row in rows.values():
        assert row["seeds"] == [43, 44]
        assert min(row["rates"], key=row["rates"].get) == f"{row['rate']:g}"
        assert row["divergence"]["low"] <= row["divergence"]["mean"] <= row["divergence"]["high"]
        assert row["forgetting"]["mean"] > 0
        assert set(row["accuracy"]) == {"embedded"}
        assert {"start.gradient_snr", "start.gradient_cosine"} < set(row["signals"])
    minus = rows["full_vocab"]["minus_baseline"]["divergence"]["mean"]
    means = [rows[name]["divergence"]["mean"] for name in ("full_vocab", "log_ratio")]
    assert minus == pytest.approx(means[0] - means[1])
    assert rows["log_ratio"]["minus_baseline"] is None
    assert [one["question"][0] for one in content["answers"]] == ["Full vocabulary against vanilla"]
    assert content["cost"]["seeds"]["runs"] == 4
    assert set(content["before"]) == {"embedded", "divergence"}
    assert set(content["teacher"]) == {"embedded"}
    text = (recipe_file.parent / "runs/small-bench/bench.md").read_text()
    assert "| full_vocab | 0.00" in text
    assert not list(recipe_file.parent.rglob("runs/**/*.safetensors"))  # no weights are kept
    monkeypatch.setattr(Here, "run", lambda self: pytest.fail("nothing is left to do"))
    capsys.readouterr()
    assert not bench(recipe_file, *options)
    assert "Full vocabulary against vanilla" in capsys.readouterr().out


@pytest.mark.thorough
def test_accuracy_may_choose_the_rate(recipe_file: Path) -> None:
    options = ["--only=log_ratio", "--snr=0", "--seeds=1", "train.steps=1"]
    assert not bench(recipe_file, *options, "--metric=avg_at_k")
    content = found(recipe_file)
    (row,) = content["rows"]
    assert content["metric"] == "avg_at_k"
    assert set(row["rates"].values()) == {1.0}  # this student solves nothing
    assert row["rate"] == 0.001  # the first of equals
    text = (recipe_file.parent / "runs/small-bench/bench.md").read_text()
    assert "| log_ratio | **0.0** | 0.0 |" in text


@pytest.mark.thorough
def test_a_setting_that_diverges_at_every_rate_has_no_figures(recipe_file: Path) -> None:
    assert not bench(recipe_file, "train.learning_rate=1e30", "--only", "log_ratio", "--snr", "0")
    (row,) = found(recipe_file)["rows"]
    assert row["rates"] == {"1e+30": None, "3e+30": None}
    assert (row["rate"], row["seeds"], row["divergence"]) == (None, [], None)


@pytest.mark.thorough
def test_forgetting_is_the_divergence_from_the_start(recipe: MAKES, tmp_path: Path) -> None:
    """It is 0 before training; after it, what `poweropd eval` measures of the exported student."""
    config = recipe(**{"train.steps": 2, "train.learning_rate": 1e-2, "train.seed": 5})
    trainer = Trainer(config, progress=False)
    start = divergence_from_start(trainer, "embedded:other", tmp_path / "before")
    assert start == {"forgetting": pytest.approx(0.0, abs=1e-6)}
    result = trainer.train()
    moved = divergence_from_start(trainer, "embedded:other", tmp_path / "after")
    report = measure_divergence(
        str(result.final),
        TeacherConfig(model=config.model.student, dtype="float32"),
        DataConfig(prompts="embedded:other"),
        DivergenceSettings(max_new_tokens=12, seed=5),
        tmp_path / "judged",
        ModelOptions("float32", trust_remote_code=False, batch_size=64),
        limit=64,
    )
    expected = report.divergence.figures["reverse_kl"].mean
    assert moved["forgetting"] == pytest.approx(expected, rel=1e-4)
    assert moved["forgetting"] > 1e-3


def test_other_sums_are_shorter_than_the_tasks() -> None:
    found = task.problems("other", 200)
    assert {len(one.terms) for one in found} == {3, 4, 5}
    assert all(task.split_of(one.terms) == "other" for one in found)


@pytest.mark.thorough
def test_a_series_in_one_process_trains_as_each_does_alone(recipe: MAKES, tmp_path: Path) -> None:
    def training(name: str, seed: int) -> Training:
        config = recipe(**{"run.dir": str(tmp_path / name), "train.seed": seed})
        RunDirectory.open(config)
        return Training("", config, [Measurement(3, batches=2)], trial=True)

    alone = training("alone", 2)
    process.train_and_measure(alone.directory.config_path, alone.measurements, trial=True)
    series = Series([training("first", 1), training("second", 2)])
    with runner.only_sweep(tmp_path) as lock:
        outcome = runner.JobRunner([series], 1, lock).run()
    assert (outcome.failed, outcome.unfinished) == ({}, [])
    assert series.progress() == (series.work, "2 of 2 trainings")
    keys = ("loss", "grad_norm", "reverse_kl", "num_tokens")
    rows = [[{k: row[k] for k in keys} for row in one.directory.metrics()] for one in
            (alone, series.trainings[1])]  # fmt: skip
    assert rows[0] == rows[1]
    snr = [
        one.points()[one.measurements[0]]["gradient_snr"] for one in (alone, series.trainings[1])
    ]
    assert snr[0] == snr[1]
