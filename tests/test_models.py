"""The student's weights for others: names, ties, adapters, dtypes, and what is saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from poweropd.config.sections import LoraConfig
from poweropd.errors import UsageError
from poweropd.models import devices
from poweropd.models.language_model import Student
from poweropd.models.loading import add_lora, load_model

IDS = torch.arange(8)[None]


@pytest.fixture(params=[None, LoraConfig(r=2)], ids=["plain", "lora"])
def student(request: pytest.FixtureRequest, student_dir: Path) -> Student:
    model = load_model(str(student_dir), "float32")
    if request.param is not None:
        model = add_lora(model, request.param)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return Student(model, 103, torch.float32, lora=request.param is not None)


def test_gathered_weights_are_those_of_a_plain_model(student: Student, student_dir: Path) -> None:
    before = {name: p.clone() for name, p in student.named_parameters()}
    plain = load_model(str(student_dir), "float32")
    gathered = dict(student.gathered_weights())
    assert gathered.keys() == plain.state_dict().keys()
    assert torch.equal(gathered["lm_head.weight"], gathered["model.embed_tokens.weight"])
    plain.load_state_dict(gathered)
    torch.testing.assert_close(plain(input_ids=IDS).logits, student.model(input_ids=IDS).logits)
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())


def test_gathered_weights_come_in_the_compute_dtype(student_dir: Path) -> None:
    student = Student(load_model(str(student_dir), "float32"), 103, torch.bfloat16)
    assert {tensor.dtype for _, tensor in student.gathered_weights()} == {torch.bfloat16}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_a_saved_model_computes_the_same_and_has_a_tied_head_once(
    student: Student, tmp_path: Path
) -> None:
    student.save(tmp_path, dict(student.exported(merge=True)), [3], merge=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.generation_config.eos_token_id == [3]
    torch.testing.assert_close(saved(input_ids=IDS).logits, student.model(input_ids=IDS).logits)


def test_auto_is_bfloat16_where_the_machine_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for native, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=native: found)
        assert devices.dtype_here("auto") == expected
        assert devices.name_of(devices.torch_dtype("auto")) == expected
    assert devices.dtype_here("float16") == "float16"
    with pytest.raises(UsageError, match=r"dtype: expected one of auto, bfloat16, .*got 'int8'"):
        load_model("embedded:student", "int8")
