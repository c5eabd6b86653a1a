"""The in-process vLLM engine, for real: what it samples, and whose weights it holds."""

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import build_model, train_on_two_processes
from rollout_cases import make_request
from torch import Tensor
from vllm_models import widened_student

from poweropd import Config, Trainer
from poweropd.config.shipped import shipped_recipe
from poweropd.data.rollout import Request, Rollout
from poweropd.embedded import END_OF_TEXT
from poweropd.errors import RunError, UsageError
from poweropd.evaluation.benchmarks import load_benchmark
from poweropd.evaluation.runner import load_subject
from poweropd.rollouts.base import Sampling, completion_seed
from poweropd.rollouts.vllm import VllmEngine
from poweropd.sweep.jobs import solving
from poweropd.sweep.process import solve

# vLLM's own imports warn.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
MAKES = Callable[..., Config]
OPTIONS = {"kv_cache_memory_bytes": 1 << 26, "enforce_eager": True}
VOCABULARY = 103


@pytest.fixture(scope="session")
def wide_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's CPU attention takes heads of 32 dimensions and more."""
    return build_model(tmp_path_factory.mktemp("models") / "wide", END_OF_TEXT, 64, seed=1)


@pytest.fixture
def sampled(recipe: MAKES, wide_student: Path) -> MAKES:
    def make(**overrides: Any) -> Config:
        own = {"model.student": str(wide_student), "rollout.engine": "vllm"}
        return recipe(**{**own, "rollout.vllm": OPTIONS, "train.steps": 4, **overrides})

    return make


def requests(count: int) -> list[Request]:
    prompts = [[1, 5, 7, *range(20, 22 + i % 5)] for i in range(count)]
    return [make_request(i, ids, seed=completion_seed(0, 0, i, 0)) for i, ids in enumerate(prompts)]


def generate(trainer: Trainer, count: int, **sampling: Any) -> list[Rollout]:
    options = {"max_new_tokens": 20, "stop_ids": trainer.sampling.stop_ids, **sampling}
    rollouts = trainer.engine.generate(requests(count), Sampling(**options))
    return sorted(rollouts, key=lambda r: r.key)


@torch.no_grad()
def worst(trainer: Trainer, rollouts: list[Rollout]) -> float:
    """The largest difference of the engine's log-probs from the student's own."""
    differences = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        log_probs = trainer.student.model(ids).logits[0, :, :VOCABULARY].log_softmax(-1)
        own = log_probs[len(rollout.prompt_ids) - 1 : -1].gather(
            1, torch.tensor(rollout.completion_ids)[:, None]
        )
        sampled = torch.tensor(rollout.completion_mask or [True] * len(rollout.completion_ids))
        off = own[:, 0] - torch.tensor(rollout.sampling_log_probs)
        differences.append(off[sampled].abs().max())
    return torch.stack(differences).max().item()


def test_after_each_of_20_steps_the_engine_holds_the_students_weights(sampled: MAKES) -> None:
    trainer = Trainer(sampled(), progress=False)
    before = generate(trainer, 4)
    for step in range(20):
        trainer.step(step)
        assert worst(trainer, generate(trainer, 4)) < 1e-4
    assert worst(trainer, before) > 1e-2  # and they have changed


def test_a_head_that_is_left_out_of_the_sync_stops_the_run(sampled: MAKES) -> None:
    trainer = Trainer(sampled(**{"rollout.verify_every": 2, "train.steps": 20}), progress=False)
    engine = trainer.engine.engine
    whole = engine.weights

    def without_head() -> Iterator[tuple[str, Tensor]]:
        return (pair for pair in whole() if pair[0] != "lm_head.weight")

    engine.weights = without_head
    trainer.step(0)
    with pytest.raises(RunError, match=r"after sync 3 its log-probs differ from the student's by"):
        trainer.step(1)


def test_an_adapter_is_merged_into_what_is_synced(sampled: MAKES) -> None:
    trainer = Trainer(sampled(**{"model.lora": {"r": 4}, "train.learning_rate": 1e-2}))
    before = generate(trainer, 4)
    for step in range(3):
        trainer.step(step)
    assert worst(trainer, generate(trainer, 4)) < 1e-4 < 1e-2 < worst(trainer, before)


def test_ids_past_the_shared_vocabulary_do_not_exist_for_vllm(
    sampled: MAKES, tmp_path: Path
) -> None:
    padded = build_model(tmp_path / "padded", END_OF_TEXT, 64, seed=3, rows=128)
    trainer = Trainer(sampled(**{"model.student": str(padded)}), progress=False)
    trainer.step(0)
    rollouts = generate(trainer, 64, stop_ids=())
    assert {i for r in rollouts for i in r.completion_ids} <= set(range(VOCABULARY))
    assert worst(trainer, rollouts) < 1e-4


def test_what_is_sampled(sampled: MAKES) -> None:
    trainer = Trainer(sampled(**{"rollout.max_new_tokens": 30}), progress=False)
    with pytest.raises(UsageError, match=r"max_model_len: \d+ tokens do not hold a prompt of"):
        generate(trainer, 1, max_new_tokens=100)
    rollouts = generate(trainer, 40, max_new_tokens=30)
    stops = set(trainer.sampling.stop_ids)
    assert {r.stopped for r in rollouts} == {True, False}
    for rollout in rollouts:
        assert not stops & set(rollout.completion_ids[:-1])
        assert rollout.stopped == (rollout.completion_ids[-1] in stops)
        assert rollout.stopped or len(rollout.completion_ids) == 30
    # The same whoever it is sampled with; log-probs are those of temperature 1 at any other.
    assert [r.completion_ids for r in generate(trainer, 7, max_new_tokens=30)] == [
        r.completion_ids for r in rollouts[:7]
    ]
    cold = generate(trainer, 6, temperature=0.7, top_p=0.9, top_k=30)
    assert worst(trainer, cold) < 1e-4
    greedy = generate(trainer, 2, temperature=0.0)
    assert [r.completion_ids for r in greedy] == [
        r.completion_ids for r in generate(trainer, 2, temperature=0.0)
    ]
    # Leaving early leaves nothing behind.
    some = list(islice(trainer.engine.generate(requests(8), trainer.sampling), 1))
    assert len(some) == 1
    assert [r.completion_ids for r in generate(trainer, 40, max_new_tokens=30)] == [
        r.completion_ids for r in rollouts
    ]


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds/", "tokens_per_second", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]


def test_a_run_is_repeatable_and_resumes_exactly(sampled: MAKES, tmp_path: Path) -> None:
    Trainer(sampled(), progress=False).train()
    resumed = sampled(**{"run.dir": str(tmp_path / "resumed")})
    for until in (2, None):
        Trainer(resumed, progress=False).train(until=until)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "resumed")


def test_two_processes_give_the_losses_of_one(sampled: MAKES, tmp_path: Path) -> None:
    Trainer(sampled(), progress=False).train()
    recipe = tmp_path / "two.yaml"
    recipe.write_text(sampled(**{"run.dir": str(tmp_path / "two")}).to_yaml())
    train_on_two_processes(recipe)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(tmp_path / "two"), strict=True):
        assert mine["num_tokens"] == theirs["num_tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_conversations_by_vllm_are_those_of_one_process(
    sampled: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment answers, the student goes on, and its log-probs are those of its weights."""
    talk = {"environment": "own_tools:Doubting", "max_turns": 3, "max_new_tokens": 60}
    talk = {f"rollout.{key}": value for key, value in talk.items()}
    trainer = Trainer(sampled(**talk), progress=False)
    rollouts = generate(trainer, 40, max_new_tokens=60)
    assert max(r.turns.turns for r in rollouts if r.turns) > 1
    assert {trained for r in rollouts for trained in r.completion_mask or []} == {True, False}
    assert worst(trainer, rollouts) < 1e-4
    trainer.train()
    recipe = tmp_path / "two.yaml"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    recipe.write_text(sampled(**talk, **{"run.dir": str(tmp_path / "two")}).to_yaml())
    train_on_two_processes(recipe)
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(tmp_path / "two"), strict=True):
        for key in ("num_tokens", "completions/mean_turns", "completions/mean_length"):
            assert mine[key] == theirs[key]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_options_that_vllm_does_not_know_are_refused(wide_student: Path) -> None:
    with pytest.raises(UsageError, match=r"rollout.vllm: vLLM refuses these options: .*max_lem"):
        VllmEngine(str(wide_student), lambda: (), {"max_lem": 3})


def test_the_demos_training_gets_somewhere_with_vllm(tmp_path: Path) -> None:
    """A fifth of its steps at five times its rate; benchmarks/rollouts.py has the whole of it."""
    student = widened_student(tmp_path / "student")
    problems = load_benchmark("embedded", limit=128)
    overrides = ["train.steps=40", "train.learning_rate=1e-4", f"run.dir={tmp_path}/run"]
    config = Config.load(shipped_recipe("demo.yaml"), overrides)
    settings, tree = solving(config), config.model_dump()
    shipped = load_subject(str(student), "float32")
    before = solve(shipped, problems, settings, tmp_path / "before.jsonl")
    tree["model"]["student"] = str(student)
    tree["rollout"] |= {"engine": "vllm", "vllm": OPTIONS}
    final = Trainer(Config.from_dict(tree), progress=False).train().final
    trained = load_subject(str(final), "float32")
    after = solve(trained, problems, settings, tmp_path / "after.jsonl")
    assert after["accuracy"] > before["accuracy"] + 0.1
