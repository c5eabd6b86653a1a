"""Keys of the teacher, the reward and the objective do what the reference says of them."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_server import NAME, TeacherServer
from torch import Tensor

from poweropd import Config, Trainer, net
from poweropd.config.teachers import TeacherConfig
from poweropd.data.rollout import Example
from poweropd.errors import RunError
from poweropd.models.loading import load_model
from poweropd.objectives.base import TokenRecord
from poweropd.teachers import factory
from poweropd.training.update import UpdateOutcome

MAKES = Callable[..., Config]


def trainer_of(config: Config) -> Trainer:
    return Trainer(config, progress=False)


def first_update(trainer: Trainer) -> UpdateOutcome:
    examples = trainer.scored(trainer.sample(0))
    outcome = trainer.updater.update(examples, trainer.reward.at(0), 0)
    assert outcome is not None
    return outcome


def first_record(config: Config) -> TokenRecord:
    return first_update(trainer_of(config)).record


def gradient(trainer: Trainer, examples: Sequence[Example]) -> Tensor:
    """The gradient of the first step's loss on these examples."""
    num_tokens = trainer.updater.objective.num_tokens([e.num_tokens for e in examples])
    trainer.updater.accumulate(examples, trainer.reward.at(0), num_tokens)
    weights = trainer.student.trained_weights().values()
    return torch.cat([p.grad.flatten() for p in weights])


# The teacher.


def test_the_teacher_is_the_named_one(recipe: MAKES, student_dir: Path) -> None:
    """A student that is its own teacher has nothing to learn."""
    other, own = recipe(), recipe(**{"teacher.model": str(student_dir)})
    for config, is_own in ((other, False), (own, True)):
        record = first_record(config)
        same = torch.allclose(record.teacher_log_probs, record.student_log_probs, atol=1e-4)
        assert same == is_own


def test_a_teacher_computes_in_its_dtype(recipe: MAKES) -> None:
    exact = trainer_of(recipe())
    rounded = trainer_of(recipe(**{"teacher.dtype": "bfloat16"}))
    assert {p.dtype for p in rounded.models.teacher.parameters()} == {torch.bfloat16}
    rollouts = list(exact.sample(0))
    pairs = zip(exact.scored(rollouts), rounded.scored(rollouts), strict=True)
    differences = torch.cat([a.teacher_log_probs - b.teacher_log_probs for a, b in pairs]).abs()
    assert 1e-4 < differences.mean() < 0.1


def test_a_teacher_reads_so_many_tokens_at_once(recipe: MAKES) -> None:
    trainer = trainer_of(recipe(**{"teacher.max_tokens_per_batch": 70}))
    shapes: list[torch.Size] = []
    table = trainer.models.teacher.causal_lm.get_input_embeddings()
    table.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    examples = trainer.scored(trainer.sample(0))
    assert sum(e.teacher_length for e in examples) > 70
    assert len(shapes) > 1
    assert max(shape.numel() for shape in shapes) <= 70


@pytest.mark.parametrize("offload", [False, True])
def test_an_offloaded_teacher_is_on_the_device_only_while_it_scores(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    trainer = trainer_of(recipe(**{"teacher.offload": offload}))
    moves: list[str] = []
    teacher, move = trainer.models.teacher, trainer.models.teacher.to

    def moved(device: Any) -> Any:
        moves.append(torch.device(device).type)
        return move(device)

    monkeypatch.setattr(teacher, "to", moved)
    trainer.scored(trainer.sample(0))
    device = trainer.accelerator.device.type
    assert moves == ([device, "cpu"] if offload else [])


@pytest.mark.parametrize("measured", [False, True])
def test_a_quantized_teacher_scores_and_is_measured_if_asked_for(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    """Rounding to bfloat16 stands for a library that quantizes."""
    asked = []

    def rounded(section: TeacherConfig, quantization: Any, device: torch.device) -> Any:
        asked.append(quantization)
        return load_model(section.model, "bfloat16").to(device=device, dtype=torch.float32)

    monkeypatch.setattr(factory, "_load_quantized", rounded)
    quantization = {"quant_method": "mine", "bits": 16}
    keys = {"quantization": quantization, "measure_quantization": measured}
    trainer = trainer_of(recipe(**{f"teacher.{key}": value for key, value in keys.items()}))
    trainer.scored(trainer.sample(0))
    assert asked == [quantization]
    path = trainer.run.path / "quantization.json"
    assert path.exists() == measured
    if measured:
        assert json.loads(path.read_text())["mean_abs_log_prob_difference"] > 1e-4


def test_a_request_to_a_teacher_has_so_much_time(
    recipe: MAKES, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net, "FIRST_DELAY", 0.02)
    keys = {"timeout": 0.3, "patience": 0.3, "tokenizer": str(teacher_dir), "model": NAME}
    with TeacherServer(teacher_dir) as server:
        section = {f"teacher.{key}": value for key, value in keys.items()}
        trainer = trainer_of(recipe(**section, **{"teacher.servers": [server.url]}))
        server.gate = threading.Event()
        begun = time.monotonic()
        with pytest.raises(RunError, match=r"no answer within teacher.timeout=0.3 seconds"):
            trainer.scored(trainer.sample(0))
        server.gate.set()
    assert time.monotonic() - begun < 30


# The reward. t and p are log-probs of teacher and student.


def powers(t: Tensor, p: Tensor, alpha: float) -> Tensor:
    return (alpha * t).exp() - (alpha * p).exp()


FORMULAS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "log_ratio": ({}, lambda t, p: t - p),
    "clip.low": ({"low": -0.2}, lambda t, p: (t - p).clamp(-0.2, 1.0)),
    "clip.high": ({"high": 0.3}, lambda t, p: (t - p).clamp(-1.0, 0.3)),
    "tanh.temperature": ({"temperature": 0.7}, lambda t, p: ((t - p) / 0.7).tanh()),
    "power.alpha": ({"alpha": 0.5}, lambda t, p: powers(t, p, 0.5)),
    "power.scale": ({"scale": "box_cox"}, lambda t, p: powers(t, p, 5.0) / 5),
    "hellinger.cap": ({"cap": 0.5}, lambda t, p: 2 * ((t - p).div(2).exp() - 1).clamp(max=0.25)),
    "tsallis.q": (
        {"q": 2.0},
        lambda t, p: (1 - (p - t).exp()).clamp(-10, 10),
    ),
    "tsallis.cap": ({"cap": 0.5}, lambda t, p: (2 * ((t - p).div(2).exp() - 1)).clamp(-0.5, 0.5)),
    "proximal.share": ({"share": 0.2}, lambda t, p: (0.2 * (t - p).exp() + 0.8).log()),
    "jensen_shannon.beta": ({"beta": 0.2}, lambda t, p: 0.8 * (0.2 * (t - p).exp() + 0.8).log()),
    "trust.bound": ({"bound": 1.0}, lambda t, p: (t - p).where((t - p).abs() <= 1, 0.0)),
    "trust.base": (
        {"base": {"name": "sign"}},
        lambda t, p: (t - p).sign().where((t - p).abs() <= 2, 0.0),
    ),
    # The reference is the student itself as it is at the first step.
    "extrapolate.factor": ({"factor": 3.0}, lambda t, p: 3 * (t - p)),
    "extrapolate.base": (
        {"base": {"name": "power", "alpha": 0.5}},
        lambda t, p: 1.25 * powers(t, p, 0.5),
    ),
    "sign": ({}, lambda t, p: (t - p).sign()),
    "suppress.threshold": ({"threshold": 0.05}, lambda t, p: -(p.exp() < 0.05).double()),
    "gate.threshold": ({"threshold": 1e-3}, lambda t, p: (t.exp() > 1e-3).double()),
    "zscore.base": (
        {"base": {"name": "clip", "low": -0.5}},
        lambda t, p: standardized((t - p).clamp(-0.5, 1.0)),
    ),
}


def standardized(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(correction=0)


@pytest.mark.parametrize("key", FORMULAS)
def test_the_reward_and_its_parameters_are_those_of_the_recipe(recipe: MAKES, key: str) -> None:
    parameters, formula = FORMULAS[key]
    record = first_record(recipe(reward={"name": key.partition(".")[0], **parameters}))
    expected = formula(record.teacher_log_probs.double(), record.student_log_probs.double())
    assert len(set(expected.tolist())) > 1
    torch.testing.assert_close(record.rewards.double(), expected, atol=1e-5, rtol=1e-4)


# The objective.


def one(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """A reward that says the same of every token."""
    return torch.ones_like(student_log_probs)


def test_the_baseline_is_the_expected_reward(recipe: MAKES) -> None:
    """A reward that is the same for all tokens is all baseline, and nothing is left to train."""
    reward = {"name": f"{__name__}:one"}
    for baseline in ("none", "value"):
        trainer = trainer_of(recipe(reward=reward, **{"objective.baseline": baseline}))
        largest = gradient(trainer, trainer.scored(trainer.sample(0))).abs().max()
        assert (largest < 1e-5) == (baseline == "value")


def changed_at_the_end(examples: Sequence[Example]) -> list[Example]:
    """The same completions with another last token, which no later token has read."""
    made = []
    for example in examples:
        ids = [*example.rollout.completion_ids]
        ids[-1] = (ids[-1] + 1) % 90
        student, teacher = example.student_targets.clone(), example.teacher_targets.clone()
        student[-1] = teacher[-1] = ids[-1]
        rollout = replace(example.rollout, completion_ids=ids)
        targets = {"student_targets": student, "teacher_targets": teacher}
        made.append(replace(example, rollout=rollout, **targets))
    return made


def test_only_a_sampled_objective_depends_on_the_sampled_token(recipe: MAKES) -> None:
    keys = {"reward.name": "log_ratio", "objective.stop": "raw"}
    for kind in ("sampled", "full_vocab"):
        trainer = trainer_of(recipe(**keys, **{"objective.kind": kind}))
        examples = trainer.scored(trainer.sample(0))
        others = trainer.scored([e.rollout for e in changed_at_the_end(examples)])
        found, other = gradient(trainer, examples), gradient(trainer, others)
        same = (found - other).norm() < 1e-4 * found.norm()
        assert same == (kind == "full_vocab")


def test_so_many_tokens_are_summed_over(recipe: MAKES) -> None:
    keys, found = {"reward.name": "log_ratio", "objective.kind": "full_vocab"}, {}
    for top_k in (None, 103, 2):
        trainer = trainer_of(recipe(**keys, **{"objective.top_k": top_k}))
        found[top_k] = gradient(trainer, trainer.scored(trainer.sample(0)))
    size = found[None].norm()
    assert (found[103] - found[None]).norm() < 1e-4 * size
    assert (found[2] - found[None]).norm() > 0.1 * size


STOPS = {  # policy -> whether the stop is trained, whether as the student's own, and the teacher's
    "raw": (True, True, False),
    "mask": (False, True, False),
    "canonical": (True, False, True),
    "cross": (True, True, True),
    "semantic": (True, True, False),
}


@pytest.mark.parametrize("policy", STOPS)
def test_the_stop_is_trained_by_its_policy(recipe: MAKES, policy: str) -> None:
    trained, by_student, by_teacher = STOPS[policy]
    trainer = trainer_of(recipe(**{"objective.stop": policy}))
    own, teachers = (trainer.inputs.student_stop_ids[0], trainer.inputs.teacher_stop_ids("")[0])
    assert own != teachers
    rollouts = [
        replace(r, completion_ids=[5, own], sampling_log_probs=[-1.0, -1.0], stopped=True)
        for r in trainer.sample(0)
    ]
    examples = trainer.scored(rollouts)
    assert [e.num_tokens for e in examples] == [1 + trained] * 4
    if trained:
        assert {int(e.student_targets[-1]) for e in examples} == {own if by_student else teachers}
        assert {int(e.teacher_targets[-1]) for e in examples} == {teachers if by_teacher else own}
    record = trainer.updater.accumulate(examples, trainer.reward.at(0), 8)[1]
    assert record.sampler_log_ratios[-1].isnan() == (policy in ("semantic", "canonical"))


def test_tokens_are_selected_as_said(recipe: MAKES) -> None:
    choices: list[dict[str, Any]] = [
        {"name": "random", "keep": 0.5},
        {"name": "dial", "keep": 0.5},
        {"name": "dial", "keep": 0.5, "beta": 0.0},
        {"name": "dial", "keep": 0.2},
        {"name": "teachable", "keep": 0.5},
        {"name": "teachable", "keep": 0.5, "top_k": 1},
    ]
    outcomes = [
        first_update(trainer_of(recipe(**{"objective.select": choice}))) for choice in choices
    ]
    kept = [(o.record.prompt_indices * 100 + o.record.positions).tolist() for o in outcomes]
    assert kept[0] != kept[1] != kept[2] != kept[0]
    assert kept[4] != kept[5]
    assert [len(k) for k in kept[:3]] == [len(kept[0])] * 3
    fractions = [outcome.selected_fraction for outcome in outcomes]
    assert fractions == pytest.approx([0.5, 0.5, 0.5, 0.2, 0.5, 0.5], abs=0.1)  # rounded up


def test_tokens_are_weighted_as_said(recipe: MAKES) -> None:
    """The loss is that of the rewards, with each completion's first token at 1 + gamma."""
    reward = {"name": "log_ratio"}
    for weights in (None, {"name": "drift"}, {"name": "drift", "gamma": 3.0}):
        gamma = 0.0 if weights is None else weights.get("gamma", 0.5)
        outcome = first_update(trainer_of(recipe(reward=reward, **{"objective.weights": weights})))
        record, expected = outcome.record, 0.0
        for prompt in record.prompt_indices.unique():
            own = record.prompt_indices == prompt
            rewards, before = record.rewards[own].double(), 0.0
            for r, p in zip(rewards, record.student_log_probs[own], strict=True):
                weight = 1 + gamma * (1 - before / rewards.abs().sum().item())
                before += abs(r.item())
                expected -= weight * r.item() * p.item() / outcome.num_tokens
        assert outcome.loss == pytest.approx(expected, rel=1e-4)


def test_truncated_scores_are_over_what_sampling_keeps(recipe: MAKES) -> None:
    """Of a single kept token, both models are certain."""
    for score in ("full", "truncated"):
        record = first_record(recipe(**{"rollout.top_k": 1, "rollout.score": score}))
        for log_probs in (record.student_log_probs, record.teacher_log_probs):
            assert bool((log_probs == 0).all()) == (score == "truncated")
