"""The demo's parts, on a small scale: the whole of it runs in CI."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from poweropd.errors import RunError
from poweropd.report import figures
from poweropd.sweep import demo
from poweropd.training import gradient_noise
from poweropd.training.gradient_noise import mean_cosine, signal_to_noise
from poweropd.training.trainer import Result, Trainer


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (demo, "START_BATCHES", 2),
        (demo, "CURVE_BATCHES", 2),
        (gradient_noise, "PROMPTS", 4),
    ):
        monkeypatch.setattr(module, name, value)


def test_a_run_of_the_demo_is_measured_on_its_way_and_not_repeated(tmp_path: Path) -> None:
    job = demo.Job("power", seed=0, steps=3, num_problems=16, out=tmp_path)
    found = demo.train_job(job)
    assert [point["step"] for point in found["points"]] == [0, 1, 2, 3]
    assert 0 <= found["accuracy"] <= 1
    assert len(found["solved"]) == 16
    again = demo.train_job(job)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


def test_an_interrupted_run_is_not_taken_for_a_measured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Result(tmp_path, steps=1, final=None, interrupted_by=2)
    monkeypatch.setattr(Trainer, "train", lambda self, until: stopped)
    with pytest.raises(RunError, match="the same command goes on"):
        demo.train_job(demo.Job("power", seed=0, steps=3, num_problems=16, out=tmp_path))


def run(reward: str, seed: int, right: list[int]) -> dict[str, Any]:
    return {
        "reward": reward,
        "seed": seed,
        "accuracy": sum(right) / len(right),
        "mean_length": 30.0,
        "median_grad_norm": 1.0,
        "gradient_snr": 0.5,
        "gradient_cosine": 0.6,
        "seconds": 1.0,
        "solved": {str(i): float(r) for i, r in enumerate(right)},
    }


def test_the_summary_pairs_problems_and_averages_seeds() -> None:
    runs = [run("log_ratio", 0, [1, 0, 0, 0]), run("log_ratio", 1, [1, 1, 0, 0])]
    runs += [run("clip", s, [1, 1, 0, 0]) for s in (0, 1)]
    runs += [run("power", s, [1, 1, 1, 0]) for s in (0, 1)]
    fixed = run("none", 0, [0, 0, 0, 1])
    numbers = demo.demo_summary(fixed, fixed, runs)
    assert set(numbers) == {"problems", "before", "teacher", "runs", "differences"}
    assert numbers["problems"] == 4
    assert "solved" not in numbers["runs"][0]
    first = numbers["differences"][0]
    assert (first["reward"], first["against"]) == ("power", "log_ratio")
    assert first["mean"] == pytest.approx(0.375)
    assert first["low"] <= first["mean"] <= first["high"]
    json.dumps(numbers)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo.demo_table(numbers))
    text = console.export_text()
    assert "+0.375" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    rows = [
        {"reward": r, "seed": 0, "step": s, "accuracy": 0.5, "gradient_snr": 0.1, "lowest": -9.0}
        for r in ("log_ratio", "power")
        for s in range(3)
    ]
    figures.save_demo(rows, rows, tmp_path / "demo.png")
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
