"""Flat rows and attention implementations: the same gradients, no mixing of sequences."""

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, Lfm2Config, Lfm2ForCausalLM

from poweropd import Config, Trainer
from poweropd.data.rollout import Example
from poweropd.errors import RunError, UsageError
from poweropd.kernels import TokenStatistics
from poweropd.models.attention import mixing, packs_flat, why_not_flat
from poweropd.models.language_model import LanguageModel
from poweropd.models.loading import load_model
from poweropd.rewards import create
from poweropd.teachers.base import score
from poweropd.teachers.local import LocalTeacher

MAKES = Callable[..., Config]


def trained(config: Config) -> tuple[list[Example], int, torch.Tensor]:
    """The scored examples of a step, the number of micro-batches, and the gradient."""
    trainer = Trainer(config, progress=False)
    examples = trainer.scored(trainer.sample(0))
    num_tokens = sum(e.num_tokens for e in examples)
    trainer.updater.accumulate(examples, create("power"), num_tokens)
    grads = [p.grad for p in trainer.student.trained_weights().values() if p.grad is not None]
    batches = len(trainer.updater._micro_batches(examples))
    return examples, batches, torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("kind", ["sampled", "full_vocab"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flat_rows_give_the_scores_and_the_gradient_of_padded_ones(
    recipe: MAKES, tmp_path: Path, attention: str, kind: str
) -> None:
    found = {}
    for packing in ("padded", "flat"):
        config = recipe(
            **{"run.dir": str(tmp_path / packing), "train.packing": packing},
            **{"train.prompts_per_step": 16, "train.max_tokens_per_batch": 200},
            **{"teacher.max_tokens_per_batch": 150, "rollout.max_new_tokens": 24},
            **{"model.attention": attention, "objective.kind": kind},
        )
        found[packing] = trained(config)
    (examples, batches, expected), (flat_examples, flat_batches, got) = found.values()
    assert 1 < flat_batches <= batches
    assert (got - expected).norm() <= 1e-6 * expected.norm()
    if kind == "sampled":
        for mine, theirs in zip(flat_examples, examples, strict=True):
            torch.testing.assert_close(mine.teacher_log_probs, theirs.teacher_log_probs)


def language_model(model: Any) -> LanguageModel:
    return LanguageModel(model.eval(), 50, torch.float32)


SHAPE: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}


def test_a_model_whose_layers_mix_sequences_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = Lfm2Config(
        **SHAPE,
        intermediate_size=32,
        initializer_range=0.3,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
    )
    hybrid = language_model(Lfm2ForCausalLM(config))
    assert mixing(hybrid) > 0.01
    assert why_not_flat(hybrid) == "has layers of type conv"
    monkeypatch.setattr("poweropd.models.attention.LAYER_TYPES", {"conv", "full_attention"})
    reason = why_not_flat(hybrid)
    assert reason is not None
    assert "computes other hidden states in a flat batch" in reason


def test_a_model_without_position_ids_stays_padded(caplog: pytest.LogCaptureFixture) -> None:
    bloom = language_model(BloomForCausalLM(BloomConfig(**SHAPE, n_head=2)))
    with pytest.raises(UsageError, match=r"packing: flat: the teacher takes no position ids"):
        packs_flat(bloom, "flat", "teacher")
    bloom.causal_lm.config._attn_implementation = "flash_attention_2"
    assert not packs_flat(bloom, "auto", "teacher")
    assert "the teacher's micro-batches are padded: it takes no position ids" in caplog.text


def test_flat_rows_come_by_themselves_where_masked_blocks_are_skipped(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model(load_model(str(student_dir), "float32"))
    assert mixing(model) < 1e-5
    assert not packs_flat(model, "auto", "student")
    monkeypatch.setattr("poweropd.models.attention.PADDED", ("eager",))  # as if sdpa skipped them
    assert packs_flat(model, "auto", "student")
    assert not packs_flat(model, "padded", "student")


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it compiles
def test_compiled_layers_give_the_same_gradient(
    recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All but the last stage: writing C++ and compiling it takes a minute.
    traced = partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", traced)
    found = {}
    for on in (False, True):
        config = recipe(
            **{"run.dir": str(tmp_path / str(on)), "model.compile": on},
            **{"model.gradient_checkpointing": on},
        )
        torch._dynamo.utils.counters.clear()
        *_, found[on] = trained(config)
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == on
    assert (found[True] - found[False]).norm() <= 1e-5 * found[False].norm()


def test_an_attention_that_is_not_there_is_said(recipe: MAKES) -> None:
    with pytest.raises(UsageError, match=r"model\.attention: flash_attention_2: .*(install|GPU)"):
        Trainer(recipe(**{"model.attention": "flash_attention_2"}), progress=False)


def test_a_teacher_out_of_memory_scores_at_half_the_budget(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe(**{"train.prompts_per_step": 8}), progress=False)
    examples = trainer.scored(trainer.sample(0))
    model = trainer.models.teacher
    whole, seen = model.score, []

    def limited(sequences: Any) -> TokenStatistics:
        seen.append(sequences.input_ids.numel())
        if seen[-1] > limit:
            raise torch.OutOfMemoryError("out of memory")
        return whole(sequences)

    monkeypatch.setattr(model, "score", limited)
    limit = 70
    teacher = LocalTeacher(model, 1000)
    for mine, theirs in zip(score(teacher, examples), examples, strict=True):
        torch.testing.assert_close(mine.teacher_log_probs, theirs.teacher_log_probs)
    assert teacher.max_tokens <= limit < max(seen)
    limit = 0
    with pytest.raises(RunError, match=r"in scoring with teacher\.max_tokens_per_batch="):
        score(teacher, examples)
