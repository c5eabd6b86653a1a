"""A reward's reference model in training: what it is, what it reads, and what goes with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import make_rollout
from test_trainer import TWO, assert_same_end, assert_same_losses, free_port, start, write_recipe
from torch import Tensor

from poweropd import rewards
from poweropd.config import Config
from poweropd.data.rollout import Example
from poweropd.errors import UsageError
from poweropd.integrations.core import Advantages
from poweropd.plan import command
from poweropd.report.planes import reward_function
from poweropd.teachers.base import Unscored, score
from poweropd.teachers.referenced import Referenced
from poweropd.training.trainer import Trainer

MAKES = Callable[..., Config]
EXTRAPOLATE = {"name": "extrapolate", "factor": 2.0}
ADAPTER = {"model.lora": {"r": 4, "merge": True}, "train.learning_rate": 1e-2}


def trainer_of(config: Config) -> Trainer:
    return Trainer(config, progress=False)


def references(examples: list[Example]) -> Tensor:
    return torch.cat([e.reference_log_probs for e in examples if e.reference_log_probs is not None])


def teachers(examples: list[Example]) -> Tensor:
    return torch.cat([e.teacher_log_probs for e in examples if e.teacher_log_probs is not None])


def students(trainer: Trainer, examples: list[Example]) -> Tensor:
    return torch.tensor([x for own in trainer.student_log_probs(examples) for x in own])


def rewards_by_example(trainer: Trainer, examples: list[Example]) -> Tensor:
    """The rewards of an update on these examples, in their order."""
    reward, total = trainer.reward.at(0), sum(e.num_tokens for e in examples)
    record = trainer.updater.accumulate(examples, reward, total)[1]
    return record.rewards[torch.argsort(record.prompt_indices * 1000 + record.positions)]


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_student_before_training(recipe: MAKES, lora: bool) -> None:
    """Also after it was trained; an adapter's student is not loaded twice for that."""
    trainer = trainer_of(recipe(reward=EXTRAPOLATE, **(ADAPTER if lora else {})))
    reference = trainer.models.reference
    assert reference is not None
    assert (reference.model is trainer.student.model) == lora
    rollouts = list(trainer.sample(0))
    before = trainer.scored(rollouts)
    torch.testing.assert_close(references(before), students(trainer, before))
    for step in range(2):
        trainer.step(step)
    after = trainer.scored(rollouts)
    assert torch.equal(references(after), references(before))
    t, p, q = teachers(after), students(trainer, after), references(after)
    assert (p - q).abs().max() > 1e-3
    torch.testing.assert_close(rewards_by_example(trainer, after), 2 * t - q - p)


def test_the_reference_is_the_named_one(recipe: MAKES, teacher_dir: Path) -> None:
    """If it is the teacher, nothing is left but the base reward."""
    named = {"model": str(teacher_dir), "dtype": "float32"}
    base = {"name": "power", "alpha": 0.5}
    trainer = trainer_of(recipe(reward={**EXTRAPOLATE, "base": base}, reference=named))
    examples = trainer.scored(trainer.sample(0))
    assert torch.equal(references(examples), teachers(examples))
    expected = rewards.Power(0.5)(teachers(examples), students(trainer, examples))
    torch.testing.assert_close(rewards_by_example(trainer, examples), expected)
    trainer.train(until=1)
    recorded = json.loads((trainer.run.path / "inputs.json").read_text())
    assert "the weights of reference.model" in recorded


def test_the_reference_computes_as_said(recipe: MAKES, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainer_of(recipe(reward=EXTRAPOLATE))
    rollouts = list(plain.sample(0))
    exact = references(plain.scored(rollouts))
    keys = {"dtype": "bfloat16", "max_tokens_per_batch": 70, "offload": True}
    trainer = trainer_of(recipe(reward=EXTRAPOLATE, reference=keys))
    reference = trainer.models.reference
    assert reference is not None
    shapes, moves, move = list[torch.Size](), list[str](), reference.to
    table = reference.causal_lm.get_input_embeddings()
    table.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))

    def moved(device: Any) -> Any:
        moves.append(torch.device(device).type)
        return move(device)

    monkeypatch.setattr(reference, "to", moved)
    assert 1e-4 < (references(trainer.scored(rollouts)) - exact).abs().mean() < 0.1
    assert max(shape.numel() for shape in shapes) <= 70
    assert moves == [trainer.accelerator.device.type, "cpu"]


class Numbering(Unscored):
    """Gives each example's tokens the teacher's number of prompt tokens as their log-prob."""

    def collect(self) -> list[Example]:
        return [
            e.scored(torch.full((e.num_tokens,), -float(len(e.prompt.teacher_prompt_ids))))
            for e in super().collect()
        ]


def test_it_reads_what_the_student_reads() -> None:
    examples = []
    for index in range(3):
        rollout = make_rollout(index, [1] * (index + 1), [5, 7], teacher_prompt_ids=[1] * 9)
        targets = torch.tensor([5, 7]), torch.tensor([5, 8])  # the stop of each model is its own
        examples.append(Example(rollout, torch.arange(2), *targets))
    scored = score(Referenced(Numbering(), Numbering()), examples)
    assert [e.rollout for e in scored] == [e.rollout for e in examples]
    assert [e.teacher_targets.tolist() for e in scored] == [[5, 8]] * 3
    assert [e.teacher_log_probs.tolist() for e in scored] == [[-9.0, -9.0]] * 3
    assert [e.reference_log_probs.tolist() for e in scored] == [[-k - 1.0] * 2 for k in range(3)]


VARIANTS: dict[str, dict[str, Any]] = {
    "zscore": {"reward": {"name": "zscore", "base": EXTRAPOLATE}},
    "selected and weighted": {
        "objective.select": {"name": "teachable"},
        "objective.weights": {"name": "drift"},
    },
}


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_goes_with_other_settings_and_resumes(
    recipe: MAKES, tmp_path: Path, variant: str
) -> None:
    keys = {"reward": EXTRAPOLATE, **VARIANTS[variant], **(ADAPTER if variant == "zscore" else {})}
    whole = recipe(**keys)
    trainer_of(whole).train()
    parts = recipe(**{**keys, "run.dir": str(tmp_path / "parts")})
    for until in (2, None):
        trainer_of(parts).train(until=until)
    assert_same_end(Path(whole.run.dir), Path(parts.run.dir))


def test_micro_batches_keep_each_tokens_reference(recipe: MAKES) -> None:
    trainer = trainer_of(recipe(reward=EXTRAPOLATE))
    trainer.step(0)
    examples = trainer.scored(trainer.sample(1))
    whole = rewards_by_example(trainer, examples)
    trainer.updater.max_tokens = 30
    torch.testing.assert_close(rewards_by_example(trainer, examples), whole)


@pytest.mark.thorough
def test_two_processes_give_the_losses_of_one(recipe: MAKES, tmp_path: Path) -> None:
    keys = {**TWO, **ADAPTER, "reward": {"name": "zscore", "base": EXTRAPOLATE}}
    two = recipe(**keys, **{"run.dir": str(tmp_path / "two")})
    path = write_recipe(two, tmp_path / "two.yaml")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    ranks = [start(path, **common, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    trainer_of(recipe(**keys)).train()
    assert_same_losses(tmp_path / "run", tmp_path / "two")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"objective.kind": "full_vocab"},
            "extrapolate .* objective.kind=full_vocab needs",
        ),
        (
            {"objective.kind": "full_vocab", "objective.teacher_top_k": 5},
            "extrapolate .* objective.kind=full_vocab needs",
        ),
        ({"objective.baseline": "value"}, "objective.baseline=value needs those of the whole"),
        ({"objective.stop": "semantic"}, "objective.stop=semantic needs those of the whole"),
        ({"reward": {"name": "power"}, "reference": {}}, "reference: this reward looks at no"),
        ({"reference": {"offload": True}, "model.lora": {}}, "reference.offload: with model.lora"),
        ({"reference": {"dtype": "float32"}, "model.lora": {}}, "reference.dtype: with model.lora"),
        ({"teacher.align": "spans"}, "teacher.align: spans cannot go with reward extrapolate"),
        ({"reference": {"servers": []}}, "reference.servers: unknown key"),
        (
            {"teacher.quantization": {"bits": 4}, "teacher.measure_quantization": True},
            "teacher.measure_quantization: it cannot go with reward extrapolate",
        ),
    ],
)
def test_what_cannot_go_with_a_reference_is_refused(
    recipe: MAKES, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(**{"reward": EXTRAPOLATE, **overrides})


def test_places_without_a_reference_say_so() -> None:
    reward = rewards.create(**EXTRAPOLATE)
    for given in (reward, rewards.ZScore(reward)):
        with pytest.raises(UsageError, match="needs the log-probs of a reference model"):
            Advantages(given, whole_step=True)
    with pytest.raises(ValueError, match="a third probability, a reference model's"):
        reward_function({"name": "zscore", "base": EXTRAPOLATE}, 0)


def test_a_plan_counts_the_reference(recipe: MAKES) -> None:
    """Its weights, unless they are the student's own, and one forward of it."""
    keys = ({}, {"reward": EXTRAPOLATE}, {"reward": EXTRAPOLATE, "model.lora": {}})
    options = command.Options(gpu="H100", tokens_per_second=1000)
    plain, copied, adapted = (
        command.make_plan(recipe(**own), options).estimates[0] for own in keys
    )
    held = [{part.name: part.bytes for part in e.memory.parts} for e in (plain, copied, adapted)]
    assert held[1]["reference weights"] == held[1]["student weights"]
    assert {"reference weights", "reference activations"} & held[0].keys() == set()
    assert held[2]["reference weights"] == 0 < held[2]["reference activations"]
    forward = (plain.true.student_body + plain.true.student_head) / 3
    assert copied.true.total - plain.true.total == pytest.approx(forward)
