"""Quantized and offloaded teachers: real libraries where they are installed, refusals elsewhere."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import build_model

from poweropd import Config, Trainer
from poweropd.embedded import TURN_END
from poweropd.errors import UsageError
from poweropd.teachers import base
from poweropd.teachers.local import LocalTeacher

MAKES = Callable[..., Config]
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "torchao": {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
    },
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}
WITH_HEAD: dict[str, dict[str, Any]] = {
    "torchao": {"include_input_output_embeddings": True},
    "bitsandbytes": {"llm_int8_skip_modules": ["none"]},
}


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


@pytest.fixture(params=sorted(QUANTIZATIONS))
def library(request: pytest.FixtureRequest) -> str:
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed: run `make test-quant`")
    return request.param


def test_a_quantized_teacher_trains_and_its_effect_is_written_down(
    recipe: MAKES, library: str, tmp_path: Path
) -> None:
    pair = {"model.student": "embedded:student", "teacher.model": "embedded:teacher"}
    quantization = {"quantization": QUANTIZATIONS[library], "measure_quantization": True}
    config = recipe(**pair, **{f"teacher.{key}": value for key, value in quantization.items()})
    trainer = Trainer(config, progress=False)
    (name,) = {type(p).__name__ for p in trainer.models.teacher.parameters()} - {"Parameter"}
    assert name in ("Int8Tensor", "Params4bit")
    rollouts = list(trainer.sample(0))
    quantized = trainer.scored(rollouts)
    plain = Trainer(recipe(**pair, **{"run.dir": str(tmp_path / "plain")}), progress=False)
    unquantized = plain.scored(rollouts)
    a, b, p = (
        torch.cat(column)
        for column in zip(
            *(
                (q.teacher_log_probs, u.teacher_log_probs, q.sampling_log_probs)
                for q, u in zip(quantized, unquantized, strict=True)
            ),
            strict=True,
        )
    )
    expected = (trainer.reward(a, p) - trainer.reward(b, p)).abs().mean().item()
    measured = json.loads((Path(config.run.dir) / "quantization.json").read_text())
    assert measured["mean_abs_reward_difference"] == pytest.approx(expected, abs=1e-6)
    assert measured["num_tokens"] == len(a)
    assert 0 < measured["mean_abs_log_prob_difference"] < 1
    assert trainer.train().steps == 3


def test_a_quantized_head_is_refused(recipe: MAKES, library: str, tmp_path: Path) -> None:
    untied = build_model(tmp_path / "untied", TURN_END, 128, seed=2, tie_word_embeddings=False)
    quantization = QUANTIZATIONS[library] | WITH_HEAD[library]
    config = recipe(**{"teacher.model": str(untied), "teacher.quantization": quantization})
    with pytest.raises(UsageError, match="its head is quantized"):
        Trainer(config, progress=False)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({}, "teacher.quantization: {} does not work here .*quant_method"),
        ({"quant_method": "nope"}, "does not work here .*Unknown quantization type, got nope"),
        ({"quant_method": "gptq"}, "does not work here .*bits"),
        ({"quant_method": "torchao"}, "does not work here .*pip install 'poweropd.quant.'"),
        ({"quant_method": "awq", "bits": 4}, "AWQ does require the model to be pre-quantized"),
    ],
)
def test_what_cannot_be_quantized_here_is_refused_in_one_line(
    recipe: MAKES, quantization: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        Trainer(recipe(**{"teacher.quantization": quantization}), progress=False)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(is_installed("bitsandbytes"), reason="bitsandbytes is installed")
def test_a_missing_library_is_named(recipe: MAKES) -> None:
    quantization = QUANTIZATIONS["bitsandbytes"]
    with pytest.raises(UsageError, match=r"does not work here .*bitsandbytes"):
        Trainer(recipe(**{"teacher.quantization": quantization}), progress=False)


def test_an_offloaded_teacher_scores_the_same_and_goes_back_to_the_cpu(recipe: MAKES) -> None:
    trainer = Trainer(recipe(**{"teacher.offload": True}), progress=False)
    teacher = trainer.models.teacher
    assert teacher.device.type == "cpu"
    examples = trainer.scored(trainer.sample(0))
    assert teacher.device.type == "cpu"
    resident = base.score(LocalTeacher(teacher.to(trainer.accelerator.device), 1024), examples)
    for mine, theirs in zip(examples, resident, strict=True):
        torch.testing.assert_close(mine.teacher_log_probs, theirs.teacher_log_probs)
