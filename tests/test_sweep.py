"""Sweeps: which cells, real processes that are killed and fail, and the table at the end."""

import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from poweropd import Config, Trainer, commands, rewards
from poweropd.errors import RunError, UsageError
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import read_jsonl
from poweropd.sweep import cells, runner
from poweropd.sweep.demo import shipped_recipe
from poweropd.training import gradient_noise

MAKES = Callable[..., Config]
OVER = ("--over", "reward.alpha=1,100")


@pytest.fixture
def recipe_file(recipe: MAKES, tmp_path: Path) -> Path:
    """A small recipe; its runs take two steps."""
    config = recipe(**{"train.steps": 2, "reward": {"name": "power", "alpha": 3.0}})
    path = tmp_path / "small.yaml"
    path.write_text(config.to_yaml())
    return path


def arguments(recipe: Path, *options: str) -> list[str]:
    return ["sweep", str(recipe), "--out", str(recipe.parent / "sweep"), *options]


def sweep(recipe: Path, *options: str) -> None:
    """The command, in this process; its trainings have their own."""
    typer.main.get_command(commands.app)(arguments(recipe, *options), standalone_mode=False)


def rows(recipe: Path) -> list[dict[str, Any]]:
    return json.loads((recipe.parent / "sweep" / "sweep.json").read_text())["rows"]


def planned(recipe: Path, over: list[str], case: list[str], seeds: int = 1) -> Any:
    return cells.trainings(recipe, [], over, case, seeds, Path("out"), lambda steps: [])


def test_over_multiplies_and_case_adds_one(recipe_file: Path) -> None:
    found = planned(
        recipe_file,
        ["reward.alpha=0.5,5", "train.learning_rate=1e-3,1.0e-4"],
        ["reward.name=clip", "objective.kind=full_vocab reward.name=log_ratio"],
        seeds=2,
    )
    assert [t.cell for t in found[::2]] == [
        "alpha=0.5 learning_rate=0.001",
        "alpha=0.5 learning_rate=0.0001",
        "alpha=5 learning_rate=0.001",
        "alpha=5 learning_rate=0.0001",
        "clip",
        "full_vocab log_ratio",
    ]
    assert [t.seed for t in found] == [42, 43] * 6
    assert cells.baseline_cell(found, 2, None) == "clip"  # the first case
    assert cells.baseline_cell(found, 0, None) == found[0].cell
    assert cells.baseline_cell(found, 2, "full_vocab log_ratio") == "full_vocab log_ratio"
    assert found[-1].config.run.dir == "out/full_vocab-log_ratio-seed43"
    assert found[-1].config.objective.kind == "full_vocab"
    assert found[0].config.reward.model_dump()["alpha"] == 0.5


def test_another_reward_does_not_inherit_the_recipes_parameters(recipe_file: Path) -> None:
    (clip, tanh, power) = planned(
        recipe_file,
        [],
        ["reward.name=clip", "reward.temperature=2 reward.name=tanh", "reward.scale=box_cox"],
    )
    assert clip.config.reward.model_dump() == {"name": "clip", "low": -1.0, "high": 1.0}
    assert tanh.config.reward.model_dump() == {"name": "tanh", "temperature": 2}
    assert power.config.reward.model_dump()["alpha"] == 3.0  # the recipe's own


def test_values_may_be_lists_and_labels_stay_different(recipe_file: Path) -> None:
    lists = planned(recipe_file, ["evaluate={every: 1, benchmarks: [a, b]},null"], [])
    assert lists[0].config.evaluate.benchmarks == ["a", "b"]
    assert lists[1].config.evaluate is None
    same = planned(recipe_file, [], ["data.split=a", "train.max_tokens_per_batch=9"])
    assert [t.cell for t in same] == ["split=a", "max_tokens_per_batch=9"]
    long = planned(recipe_file, [], ["model.dtype=float16", "teacher.dtype=float16"])
    assert [t.cell for t in long] == ["model.dtype=float16", "teacher.dtype=float16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "an empty sweep: expected --over KEY=V1,V2,... or --case"),
        (["--over", "reward.alpha="], "--over reward.alpha=: expected KEY=V1,V2,..."),
        (["--over", "reward.alpha=[1"], "--over reward.alpha=[1: expected KEY=V1,V2,..."),
        (["--over", "trian.steps=1,2"], "--over trian.steps=1: "),
        (["--over", "reward.alpha=5,0"], "--over reward.alpha=0: override reward.alpha: expected"),
        (["--case", "reward.name=clap"], "--case reward.name=clap: override reward.name: expected"),
        (["--case", "reward.name=clip reward.alpha=1"], "unknown parameter of reward clip"),
        (["--case", "fast"], "--case fast: expected overrides KEY=VALUE, separated by spaces"),
        (["--case", "train.seed=1"], "--case train.seed=1: train.seed is set by --seeds"),
        (["--case", "a='1"], "--case a='1: no closing quotation"),
        (["--over", "reward.alpha=1,1"], "the same as --over reward.alpha=1"),
        ([*OVER, "--baseline", "vanilla"], "--baseline: expected one of alpha=1, alpha=100, got"),
        ([*OVER, "--snr", "1"], "--snr: expected 0 or at least 2 batches, got 1"),
        (["run.dir=x", *OVER], "run.dir: a sweep names its runs' directories; use --out"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(
    recipe_file: Path, options: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as raised:
        sweep(recipe_file, *options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (recipe_file.parent / "sweep").exists()


def test_a_dry_run_only_says_what_would_run(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(recipe_file, *OVER, "--seeds", "2", "--dry-run")
    said = capsys.readouterr().out
    assert "4 runs" in said
    assert said.count("0 of 2") == 4
    assert "4 runs are left: 8 optimizer steps, 32 completions, at most 384 tokens" in said
    assert "Scoring and update: " in said
    assert "Nothing will be evaluated: " in said
    two = said.partition("Memory: ")[2]
    sweep(recipe_file, *OVER, "--seeds", "2", "--dry-run", "--parallel", "2")
    assert "for the 2 that share a device" in capsys.readouterr().out
    assert "share" not in two
    assert not (recipe_file.parent / "sweep").exists()


@pytest.mark.thorough
def test_a_sweep_survives_a_failure_goes_on_and_compares(
    recipe_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate = "evaluate={every: 2, benchmarks: [embedded], n: 2, limit: 4, max_new_tokens: 8}"
    missing = recipe_file.parent / "later.jsonl"
    options = [evaluate, "--snr", "2", "--case", "reward.name=zscore"]
    options += ["--case", f"data.prompts={missing}"]
    with pytest.raises(RunError, match=r"1 of 2 runs failed \(logs: .*/RUN/train.log\)"):
        sweep(recipe_file, *options, "--parallel", "2")
    said = capfd.readouterr().out
    assert f": exit status 2: {missing}: cannot read it" in said
    assert "prompts=later.jsonl (0 of 1 seeds, 1 failed)" in " ".join(said.split())
    out = recipe_file.parent / "sweep"
    zscore, failed = rows(recipe_file)
    assert (zscore["cell"], zscore["finished"], failed["finished"]) == ("zscore", 1, 0)
    assert zscore["benchmarks"]["embedded"]["k"] == 2
    assert -1 <= zscore["training"]["cosine_start"] <= 1
    assert {"reverse_kl", "grad_norm", "snr_start", "snr_end"} <= set(zscore["training"])
    (first, _) = csv.DictReader(io.StringIO((out / "sweep.csv").read_text()))
    assert float(first["training grad_norm"]) == zscore["training"]["grad_norm"]
    assert float(first["embedded Avg@2"]) == zscore["benchmarks"]["embedded"]["avg_at_k"]["mean"]

    missing.write_text('{"problem": "1+2"}\n')
    began = (out / "zscore-seed42" / "metrics.jsonl").stat().st_mtime_ns
    sweep(recipe_file, *options)
    assert (out / "zscore-seed42" / "metrics.jsonl").stat().st_mtime_ns == began
    again = rows(recipe_file)
    assert again[0] == zscore
    assert again[1]["finished"] == 1
    for changed, message in (
        ([evaluate, "--snr", "2", *OVER], "holds another sweep, with zscore-seed42"),
        ([evaluate, *options[3:]], "--snr: the sweep in .* was begun with --snr 2"),
        (["train.steps=3", *options[1:]], "holds another sweep: run.dir: .*train.steps: 3 != 2"),
    ):
        with pytest.raises(UsageError, match=message):
            sweep(recipe_file, *changed)


@pytest.mark.thorough
def test_a_signal_is_passed_on_and_the_same_command_goes_on(recipe_file: Path) -> None:
    options = ["train.steps=9999", "checkpoint.every=9999", *OVER]
    running = subprocess.Popen(
        [sys.executable, "-m", "poweropd", *arguments(recipe_file, *options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = recipe_file.parent / "sweep" / "alpha=1-seed42"
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
        assert running.poll() is None
    with pytest.raises(UsageError, match="is in use by another sweep"):
        sweep(recipe_file, *options)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGINT, errors
    assert "stopped; 2 of 2 runs are not finished; the same command goes on" in errors
    steps = len(read_jsonl(run / "metrics.jsonl"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{steps}"]
    assert not (run.parent / "alpha=100-seed42" / "metrics.jsonl").exists()
    assert RunDirectory(run).steps_done() == steps


@pytest.fixture
def small_disk(recipe_file: Path) -> Iterator[None]:
    """A file system of 200 kB for the sweep or, where none can be mounted, files of that size."""
    out = recipe_file.parent / "sweep"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(out)]
    if os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0:
        yield
        subprocess.run(["umount", str(out)], check=True)
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.thorough
@pytest.mark.usefixtures("small_disk")
def test_a_disk_that_fills_up_ends_the_sweep(
    recipe_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match="the disk is full: 2 of 2 runs are not finished; free some"):
        sweep(recipe_file, *OVER)
    assert "failed: alpha=1-seed42: exit status 1" in capfd.readouterr().out
    assert not (recipe_file.parent / "sweep" / "alpha=100-seed42" / "train.log").exists()


def test_exact_gradients_agree_more_than_sampled_ones(
    recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_noise, "PROMPTS", 4)
    cosines = {}
    for kind in ("sampled", "full_vocab"):
        config = recipe(**{"objective.kind": kind, "run.dir": str(tmp_path / kind)})
        found = gradient_noise.measure_gradient(Trainer(config, progress=False), count=4)
        cosines[kind] = found["gradient_cosine"]
    assert -1 <= cosines["sampled"] < cosines["full_vocab"] <= 1


def test_projected_gradients_have_the_lengths_and_angles_of_whole_ones() -> None:
    torch.manual_seed(0)
    common = torch.randn(3_000_000)
    own = [common + 2 * torch.randn(3_000_000) for _ in range(4)]
    split = [[g[:1_999_999].view(-1, 1), None, g[1_999_999:]] for g in own]
    whole = torch.stack([gradient_noise.concatenated(parts) for parts in split])
    small = torch.stack([gradient_noise.projected(parts) for parts in split])
    assert small.shape == (4, 2**16)
    products, expected = small @ small.T, whole @ whole.T
    assert (products - expected).abs().max() < 0.02 * expected.max()
    ratio = gradient_noise.signal_to_noise(small)
    assert ratio == pytest.approx(gradient_noise.signal_to_noise(whole), rel=0.05)
    assert not torch.equal(small[0], gradient_noise.projected(split[0], seed=1))
    with pytest.raises(ValueError, match="gradient of at least one parameter"):
        gradient_noise.projected([None])


@pytest.mark.thorough
def test_projections_rank_rewards_as_whole_gradients_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the embedded pair, with the same completions; those of tanh and power."""
    monkeypatch.setattr(gradient_noise, "PROMPTS", 16)
    recipe = shipped_recipe("demo.yaml")
    trainer = Trainer(Config.load(recipe, [f"run.dir={tmp_path}/run"]), progress=False)
    batches = gradient_noise.fresh_batches(trainer, 6)
    monkeypatch.setattr(gradient_noise, "fresh_batches", lambda trainer, count: batches)
    found: dict[int, list[float]] = {}
    for stored in (2**30, 0):
        monkeypatch.setattr(gradient_noise, "STORED_BYTES", stored)
        for reward in ("tanh", "power"):
            trainer.reward = rewards.create(reward)
            measured = gradient_noise.measure_gradient(trainer, 6, cosine=False)
            found.setdefault(stored, []).append(measured["gradient_snr"])
    assert found[0] == pytest.approx(found[2**30], rel=0.03)
    assert found[0][0] < found[0][1]


def test_cores_and_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner.process_environment(0, 3, gpus=0)["OMP_NUM_THREADS"] == "2"
    shown = [
        runner.process_environment(slot, 3, gpus=2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)
    ]
    assert shown == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert runner.process_environment(1, 2, gpus=2)["CUDA_VISIBLE_DEVICES"] == "7"
    assert runner.process_environment(0, 1, gpus=2)["CUDA_VISIBLE_DEVICES"] == "4,7"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert runner.process_environment(0, 4, gpus=0)["OMP_NUM_THREADS"] == "5"
