"""The demo: its parts, and the real command, stopped by signals and gone on with."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from poweropd import Config
from poweropd.config import shipped
from poweropd.errors import RunError
from poweropd.report import figures
from poweropd.runs.directory import RunDirectory, read_jsonl
from poweropd.sweep import command, demo, process
from poweropd.sweep.jobs import Training
from poweropd.sweep.runner import SweepOutcome
from poweropd.training import gradient_noise
from poweropd.training.gradient_noise import mean_cosine, signal_to_noise
from poweropd.training.trainer import Result, Trainer

#: The real command on a small scale; its trainings are processes that know nothing of this.
SMALL = """
from poweropd import commands
from poweropd.sweep import demo

demo.START_BATCHES = demo.CURVE_BATCHES = 2
demo.SEEDS, demo.LINE_SECONDS = 1, 1.0
commands.main()
"""


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Training:
    """One of the demo's trainings: three steps, measured before the first and after each."""
    monkeypatch.setattr(demo, "START_BATCHES", 2)
    monkeypatch.setattr(demo, "CURVE_BATCHES", 2)
    monkeypatch.setattr(gradient_noise, "PROMPTS", 4)
    overrides = ["train.steps=3", f"run.dir={tmp_path}/power-seed0"]
    config = Config.load(shipped.shipped_recipe("demo.yaml"), overrides)
    return Training("power", config, demo.measurements(steps=3, problems=16))


def train(training: Training) -> Result:
    RunDirectory.open(training.config)
    return process.train_and_measure(training.directory.config_path, training.measurements)


@pytest.mark.thorough
def test_a_run_of_the_demo_is_measured_on_its_way_and_not_repeated(training: Training) -> None:
    assert training.progress() == (0, "0 of 3 steps")
    train(training)
    points = training.points()
    assert [point.step for point in points] == [0, 1, 2, 3, 3]
    assert "gradient_cosine" in points[training.measurements[0]]
    figures = demo.run_figures(training)
    assert 0 <= figures.accuracy <= 1
    assert len(demo.solved(training)) == 16
    assert set(training.directory.gradients()) == {"start", "end"}  # as reports read them
    assert training.is_finished()
    assert training.progress() == (training.work, f"3 of 3 steps, accuracy {figures.accuracy:.3f}")
    train(training)
    assert training.points() == points
    assert demo.run_figures(training) == figures


def test_an_interrupted_run_is_not_taken_for_a_measured_one(
    training: Training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped = Result(tmp_path, steps=1, final=None, interrupted_by=2)
    monkeypatch.setattr(Trainer, "train", lambda self, until: stopped)
    assert train(training) == stopped
    assert not training.points()
    assert not training.is_finished()


def test_fewer_steps_are_measured_once_each() -> None:
    assert [m.step for m in demo.measurements(200, 1024)] == [0, 66, 133, 200, 200]
    assert [m.problems for m in demo.measurements(200, 1024)] == [128, 128, 128, 128, 1024]
    assert [m.step for m in demo.measurements(2, 16)] == [0, 1, 2, 2]
    assert [m.step for m in demo.measurements(1, 16)] == [0, 1, 1]


def run(reward: str, seed: int, right: list[int]) -> demo.DemoRun:
    return demo.DemoRun(reward, seed, sum(right) / len(right), 30.0, 1.0, 0.5, 0.6, 1.0)


def test_the_summary_pairs_problems_and_averages_seeds() -> None:
    right = {
        ("log_ratio", 0): [1, 0, 0, 0],
        ("log_ratio", 1): [1, 1, 0, 0],
        **{("clip", seed): [1, 1, 0, 0] for seed in (0, 1)},
        **{("power", seed): [1, 1, 1, 0] for seed in (0, 1)},
    }
    solved = [
        (reward, {str(i): float(r) for i, r in enumerate(problems)})
        for (reward, _), problems in right.items()
    ]
    differences = demo.differences(solved)
    first = differences[0]
    assert (first["reward"], first["against"]) == ("power", "log_ratio")
    assert first["mean"] == pytest.approx(0.375)
    assert first["low"] <= first["mean"] <= first["high"]  # type: ignore[operator]
    runs = [run(*name, problems) for name, problems in right.items()]
    fixed = {"accuracy": 0.25, "mean_length": 30.0}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo.demo_table(demo.DemoFigures(4, fixed, fixed, runs, differences)))
    text = console.export_text()
    assert "+0.375" in text
    assert "(0.250, 0.500)" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_failed_training_ends_with_one_line(tmp_path: Path) -> None:
    outcome = SweepOutcome(failed={"clip-seed0": "exit status 1: no memory"}, unfinished=["a", "b"])
    with pytest.raises(
        RunError, match=r"1 of 8 runs failed \(logs: .*\): clip-seed0: exit"
    ) as error:
        command.exit_status(tmp_path, outcome, 8)
    assert "\n" not in str(error.value)


def test_the_recipe_is_found_in_a_checkout_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parent.parent
    assert shipped.shipped_recipe("demo.yaml").samefile(root / "recipes" / "demo.yaml")
    assert (
        'force-include = { "recipes" = "poweropd/recipes" }'
        in (root / "pyproject.toml").read_text()
    )
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").touch()
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path)
    assert shipped.shipped_recipe("demo.yaml") == tmp_path / "recipes" / "demo.yaml"


class Running:
    """The demo on a small scale, in a session of its own as a terminal has it."""

    def __init__(self, folder: Path, name: str) -> None:
        script, self.out, self.log = folder / "small.py", folder / name, folder / f"{name}.log"
        script.write_text(SMALL)
        options = ["--steps", "30", "--problems", "16", "--out", str(self.out)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), "demo", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def end(self, send: Callable[[int, int], None], number: int) -> str:
        """Sends a signal; returns what was said until the end, which is the end of all."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        assert len(processes) >= 2
        send(self.process.pid, number)
        assert self.process.wait(timeout=30) == 128 + number, self.log.read_text()
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert alive == []
        return self.log.read_text()

    def steps(self) -> int:
        return sum(len(read_jsonl(path)) for path in self.out.glob("*/metrics.jsonl"))

    def points(self) -> int:
        return sum(len(read_jsonl(path)) for path in self.out.glob("*/points.jsonl"))

    def figures(self) -> dict[str, Any]:
        assert self.process.wait(timeout=300) == 0, self.log.read_text()
        found = json.loads((self.out / "demo.json").read_text())
        for one in found["runs"]:
            del one["seconds"]
        return dict(found)


@pytest.mark.thorough
def test_signals_end_all_processes_and_the_same_command_goes_on(tmp_path: Path) -> None:
    first = Running(tmp_path, "stopped")
    first.wait_until(lambda: "three rewards, log_ratio, clip and power" in first.log.read_text())
    first.wait_until(lambda: first.steps() > 2)
    said = first.end(os.kill, signal.SIGTERM)
    assert "stopped; 3 of 5 runs are not finished; the same command goes on" in said
    assert list(first.out.glob("*/checkpoints/step-*"))
    steps, points = first.steps(), first.points()

    second = Running(tmp_path, "stopped")
    second.wait_until(lambda: second.points() > points)
    assert second.steps() >= steps
    second.end(os.killpg, signal.SIGINT)

    whole, third = Running(tmp_path, "whole"), Running(tmp_path, "stopped")
    assert third.figures() == whole.figures()
    assert list(whole.figures()) == ["problems", "before", "teacher", "runs", "differences"]
    assert (third.out / "demo.png").exists()
    said = whole.log.read_text()
    assert re.search(
        r"\d+% done, about 0:\d\d:\d\d left: .*\d+ of 30 steps, accuracy 0\.\d{3}", said
    )
    assert "power-seed0 ended: 30 of 30 steps, accuracy 0." in said


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    rows = [
        {"reward": r, "seed": 0, "step": s, "accuracy": 0.5, "gradient_snr": 0.1, "lowest": -9.0}
        for r in ("log_ratio", "power")
        for s in range(3)
    ]
    settings = {name: {"name": name} for name in ("log_ratio", "power")}
    figures.save_demo(rows, rows, settings, [-1, 1], tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_signal_to_noise_is_unbiased() -> None:
    torch.manual_seed(0)
    noise = torch.randn(4000, 16, 50)
    mean = torch.full((50,), 0.2)  # |mean|^2 = 2, total variance 50
    estimates = [signal_to_noise(gradients + mean) for gradients in noise]
    assert sum(estimates) / len(estimates) == pytest.approx(2 / 50, rel=0.1)
    pure = [signal_to_noise(gradients) for gradients in noise]
    assert sum(pure) / len(pure) == pytest.approx(0, abs=0.002)


def test_the_cosine_is_taken_batch_by_batch() -> None:
    gradients = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    assert mean_cosine(gradients, torch.tensor([1.0, 0.0])) == pytest.approx(0.5)
