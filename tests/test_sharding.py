"""FSDP2 in two real processes: gradients, losses, checkpoints and exports of one process."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from build_embedded import END_OF_TEXT, TURN_END
from random_models import build_model, peak_bytes
from test_trainer import SERVER, assert_same_end, free_port, metrics, weights

from poweropd import Config, Trainer
from poweropd.data.rollout import Example
from poweropd.errors import UsageError
from poweropd.models.geometry import Geometry
from poweropd.models.sharding import collected
from poweropd.plan import memory
from poweropd.rewards import create

MAKES = Callable[..., Config]
SHARES = {"ragged": 1, "nothing on the second": 0}  # examples that the second process gets
REWARDS = ("power", "zscore")


def on_two_processes(function: Callable[[int], Any]) -> None:
    """`function(rank)` in two processes that see each other as accelerate's launcher sets it."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    processes = [SERVER.Process(target=_run, args=(function, rank, common)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def _run(function: Callable[[int], Any], rank: int, environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    function(rank)


def gradients(trainer: Trainer, examples: list[Example], num_tokens: int) -> dict[str, Any]:
    """By reward: the whole gradient, and the loss of all processes."""
    found: dict[str, Any] = {}
    for name in REWARDS:
        loss, _ = trainer.updater.accumulate(examples, create(name), num_tokens)
        parameters = trainer.student.trained_weights().items()
        grads = collected(((n, p.grad) for n, p in parameters), keep=True)
        found[name] = loss, torch.cat([grad.flatten() for grad in grads.values()])
    return found


def gradients_of_shares(config: Config, examples: Path, result: Path, rank: int) -> None:
    trainer = Trainer(config, progress=False)
    every: list[Example] = pickle.loads(examples.read_bytes())
    num_tokens = sum(e.num_tokens for e in every)
    found = {}
    for name, count in SHARES.items():
        share = every[: len(every) - count] if rank == 0 else every[len(every) - count :]
        found[name] = gradients(trainer, share, num_tokens)
    if rank == 0:
        torch.save(found, result)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "tolerance"),
    [
        ({"model.lora": None}, 1e-6),
        ({"model.lora": {"r": 2}}, 1e-6),
        ({"model.dtype": "bfloat16", "model.gradient_checkpointing": True}, 3e-2),
    ],
    ids=["full", "lora", "bfloat16"],
)
def test_the_gradient_is_that_of_one_process(
    recipe: MAKES, tmp_path: Path, model: dict[str, Any], tolerance: float
) -> None:
    overrides = {"train.sharding": "fsdp2", "train.prompts_per_step": 9}
    config = recipe(**overrides, **model, **{"train.max_tokens_per_batch": 40})
    one = Trainer(config, progress=False)
    examples = one.scored(one.sample(0))
    assert len(one.updater._micro_batches(examples)) > 3
    (tmp_path / "examples").write_bytes(pickle.dumps(examples))
    expected = gradients(one, examples, sum(e.num_tokens for e in examples))
    paths = tmp_path / "examples", tmp_path / "gradients"
    on_two_processes(partial(gradients_of_shares, config, *paths))
    for share in torch.load(tmp_path / "gradients").values():
        for name, (loss, gradient) in share.items():
            assert loss == pytest.approx(expected[name][0], rel=tolerance)
            assert (gradient - expected[name][1]).norm() <= tolerance * gradient.norm()


def train(stages: list[tuple[Config, int | None]], rank: int) -> None:
    """The last stage alone may end its run: that leaves the group of processes."""
    for config, until in stages:
        Trainer(config, progress=False).train(until)


@pytest.mark.thorough
def test_runs_resume_on_any_number_of_processes(recipe: MAKES, tmp_path: Path) -> None:
    names = ("parts", "two, then one", "whole", "one, then two", "one")
    overrides = {"train.steps": 5, "train.prompts_per_step": 5, "train.sharding": "fsdp2"}
    configs = {n: recipe(**overrides, **{"run.dir": str(tmp_path / n)}) for n in names}
    parts, two, whole, taken_up, one = configs.values()
    Trainer(one, progress=False).train()
    Trainer(taken_up, progress=False).train(until=3)
    on_two_processes(partial(train, [(parts, 2), (parts, 3), (two, 3), (parts, None)]))
    for config in (whole, taken_up):
        on_two_processes(partial(train, [(config, None)]))
    Trainer(two, progress=False).train()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    for name in names:
        assert_near(tmp_path / name, tmp_path / "one")


def assert_near(run: Path, other: Path) -> None:
    for mine, theirs in zip(metrics(run), metrics(other), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-6)
    final, expected = weights(run), weights(other)
    assert final.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(final[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.thorough
def test_a_sharded_student_is_evaluated(recipe: MAKES, tmp_path: Path) -> None:
    section = {
        "every": 2,
        "benchmarks": ["embedded"],
        "limit": 3,
        "max_new_tokens": 8,
        "best": "mean_length",
    }
    overrides = {"train.steps": 2, "train.sharding": "fsdp2", "evaluate": section}
    one, two = (recipe(**overrides, **{"run.dir": str(tmp_path / n)}) for n in ("one", "two"))
    Trainer(one, progress=False).train()
    on_two_processes(partial(train, [(two, None)]))
    assert "eval/embedded/mean_length" in metrics(tmp_path / "two")[-1]
    assert (tmp_path / "two" / "best" / "model.safetensors").exists()
    assert_near(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
def test_accelerates_own_sharding_is_refused(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch, plugin: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(UsageError, match=rf"got --use_{plugin.lower()}.* train\.sharding=fsdp2"):
        Trainer(recipe(), progress=False)


def peak_of_an_update(config: Config, result: Path, rank: int) -> None:
    """Bytes of tensors that a second update holds at most, above the student and the teacher."""
    trainer = Trainer(config, progress=False)
    trainer.sampling = replace(trainer.sampling, stop_ids=())  # each as long as is counted
    examples = list(trainer.scored(list(trainer.sample(0))))
    num_tokens = 2 * sum(e.num_tokens for e in examples)

    def update() -> None:
        trainer.updater.accumulate(examples, create("power"), num_tokens)

    update()
    with torch.profiler.profile(profile_memory=True) as profile:
        update()
    if rank == 0:
        longest = max(len(e.rollout.prompt_ids) for e in examples)
        result.write_text(json.dumps([peak_bytes(profile), longest]))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_predicted_peak_of_a_sharded_update(recipe: MAKES, tmp_path: Path, dtype: str) -> None:
    wide = build_model(
        tmp_path / "student", END_OF_TEXT, 192, seed=1, rows=2048, num_hidden_layers=4
    )
    teacher = build_model(tmp_path / "teacher", TURN_END, 32, seed=2, rows=2048)
    config = recipe(
        **{"model.student": str(wide), "teacher.model": str(teacher), "model.dtype": dtype},
        **{"train.sharding": "fsdp2", "train.max_tokens_per_batch": 256},
        **{"train.prompts_per_step": 8, "rollout.max_new_tokens": 100},
    )
    on_two_processes(partial(peak_of_an_update, config, tmp_path / "peak"))
    peak, prompt = json.loads((tmp_path / "peak").read_text())
    geometry = Geometry.from_fields("student", json.loads((wide / "config.json").read_text()))
    setup = memory.Setup(
        completions=4, prompt=prompt, completion=100, max_tokens=256, teacher_max_tokens=256,
        compute=torch.finfo(getattr(torch, dtype)).bits // 8, master=4, teacher=4,
        device="cpu", shards=2,
    )  # fmt: skip
    parts = memory.of_step(geometry, geometry, setup).parts
    expected = sum(part.bytes for part in parts if part.phases == ("update",))
    assert expected == pytest.approx(peak, rel=0.15)
