"""The clock of a step, and the share of a device's peak that it reports."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rollout_cases import make_rollout

from poweropd.config import Config
from poweropd.data.rollout import Example
from poweropd.models import flops
from poweropd.models.devices import GPUS, peak_flops, peak_flops_of
from poweropd.teachers.models import RunModels
from poweropd.training import build
from poweropd.training.accounting import StepClock, Utilization, geometry_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_device_is_known_by_its_drivers_name(name: str, gpu: str) -> None:
    assert peak_flops_of(name) == GPUS[gpu].peak_flops


@pytest.mark.parametrize("name", ["NVIDIA A10G", "Tesla V100-SXM2-16GB", "AMD Instinct MI300X"])
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert peak_flops_of(name) is None


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(CPU, torch.bfloat16) is None


def example(prompt: int, completion: int) -> Example:
    prompt_ids, ids = list(range(prompt)), list(range(completion))
    rollout = make_rollout(0, prompt_ids, ids, log_probs=[0.0] * completion, stopped=False)
    targets = torch.tensor(ids)
    return Example(rollout, torch.arange(completion), targets, targets)


@pytest.fixture
def pair(recipe: Callable[..., Config]) -> RunModels:
    config = recipe()
    return build.load_models(config, build.RunInputs.load(config), CPU)


def test_mfu_is_the_models_flops_over_scoring_and_update(pair: RunModels) -> None:
    utilization = Utilization.of(pair.student, pair.teacher, False, peak=1e9)
    assert utilization is not None
    clock = StepClock(CPU)
    clock.seconds |= {"rollout": 9.0, "score": 0.5, "update": 1.5}
    examples = [example(5, 7), example(3, 2)]
    # The last token of a completion is predicted, not read.
    geometries = geometry_of(pair.student), geometry_of(pair.teacher)
    total = flops.update(*geometries, [(11, 7), (4, 2)]).total
    assert utilization.metrics(examples, clock)["mfu"] == pytest.approx(total / 2.0 / 1e9)
    assert utilization.metrics([], clock) == {}
    remote = replace(utilization, teacher=None)
    assert remote.metrics(examples, clock)["mfu"] < utilization.metrics(examples, clock)["mfu"]


def test_without_a_peak_there_is_no_utilization(pair: RunModels) -> None:
    assert Utilization.of(pair.student, pair.teacher, False) is None


def test_the_clock_tells_phases_apart() -> None:
    clock = StepClock(CPU)
    with clock.phase("rollout"):
        sum(range(10_000))
    row = clock.metrics(tokens=100)
    assert row["seconds/rollout"] > 0 == row["seconds/update"]
    assert row["tokens_per_second"] == pytest.approx(100 / row["seconds/step"])
    assert row["memory/peak_bytes"] > 10**7
