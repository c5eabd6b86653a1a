"""Situations of real models and data: each gives the right result, or one line that says what."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    CHATML,
    END_OF_TEXT,
    NEEDS_SYSTEM,
    PARTS,
    TURN_END,
    TURN_START,
    make_byte_tokenizer,
    make_config,
    make_model,
    make_recipe,
)
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from poweropd import Trainer, stops
from poweropd.config.sections import LoraConfig
from poweropd.data import chat
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Request
from poweropd.errors import UsageError
from poweropd.models import fingerprints, loading
from poweropd.models.language_model import Student, dropout_rates, with_dropout
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.runs.directory import RunDirectory
from poweropd.training.trainer import Result

IDS = torch.arange(3, 11)[None]


def write_rows(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"problem": text}) + "\n" for text in texts))
    return str(path)


def pair(folder: Path, kind: str = "qwen2", **options: Any) -> tuple[Path, Path]:
    """A student and a teacher of one kind."""
    return (
        make_model(kind, folder / "student", 0, **options),
        make_model(kind, folder / "teacher", 1, **options),
    )


def train(folder: Path, kind: str = "qwen2", models: Any = None, **overrides: Any) -> Result:
    config = make_recipe(*(models or pair(folder, kind)), folder, **overrides)
    return Trainer(config, progress=False).train()


# Adapters.


def adapted_student(folder: Path, kind: str, targets: str | list[str]) -> Student:
    """A student whose adapter does something, as after some steps."""
    model = loading.load_model(str(make_model(kind, folder)), "float32")
    model = loading.add_lora(model, LoraConfig(r=2, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return Student(model, 320, torch.float32, lora=True)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen3_moe", "all-linear"),
        ("qwen3_moe", ["q_proj", "experts.gate_up_proj", "experts.down_proj"]),
        ("mixtral", "all-linear"),
        ("qwen3_5_text", "all-linear"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_an_adapter_is_merged_under_the_names_of_the_plain_model(
    tmp_path: Path, kind: str, targets: str | list[str]
) -> None:
    student = adapted_student(tmp_path / "student", kind, targets)
    plain = loading.load_model(str(tmp_path / "student"), "float32")
    gathered = dict(student.gathered_weights())
    assert gathered.keys() == plain.state_dict().keys()
    before = plain(input_ids=IDS).logits
    plain.load_state_dict(gathered)
    after = student.model(input_ids=IDS).logits
    assert (before - after).abs().max() > 0.01
    torch.testing.assert_close(plain(input_ids=IDS).logits, after, atol=1e-3, rtol=1e-3)
    (tmp_path / "saved").mkdir()
    student.save(tmp_path / "saved", dict(student.exported(merge=True)), [2], merge=True)
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    torch.testing.assert_close(saved(input_ids=IDS).logits, after, atol=1e-3, rtol=1e-3)


def test_an_adapters_directory_is_a_model_and_its_base_is_part_of_it(tmp_path: Path) -> None:
    student, teacher = pair(tmp_path)
    result = train(tmp_path, models=(student, teacher), **{"model.lora": LORA})
    adapter = str(result.final)
    assert loading.adapted(adapter) == str(student)
    loaded = loading.load_model(adapter, "float32")
    base = loading.load_model(str(student), "float32")
    weights = load_file(result.final / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    assert not torch.equal(loaded(input_ids=IDS).logits, base(input_ids=IDS).logits)
    assert loaded.generation_config.eos_token_id == [TURN_END]
    assert loading.load_config(adapter).hidden_size == 32
    again = train(tmp_path, models=(result.final, teacher), **{"run.dir": str(tmp_path / "second")})
    assert again.steps == 2
    before = fingerprints.of_weights(adapter)
    make_model("qwen2", student, 5)
    assert fingerprints.of_weights(adapter) != before
    (result.final / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="expected an adapter's config"):
        loading.load_model(adapter, "float32")


LORA = {"r": 4}


# Weights, dropout, contexts.


def test_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    path = make_model("qwen2", tmp_path / "student")
    weights = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(path, state_dict={k: v for k, v in weights.items() if k != name})
    with pytest.raises(UsageError, match=rf"lack 1 of the model's weights .* such as {name}"):
        loading.load_model(str(path), "float32")


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "large"), ("num_attention_heads", 5), ("model_type", "no_such_model")],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, field: str, value: object) -> None:
    path = make_model("qwen2", tmp_path / "student") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UsageError, match=r"cannot load it as a model: |in its shapes") as refused:
        loading.load_model(str(path.parent), "float32")
    assert "\n" not in str(refused.value)


def test_dropout_is_off_while_training_and_back_in_the_export(tmp_path: Path) -> None:
    rates = {"attn_pdrop": 0.1, "resid_pdrop": 0.2, "embd_pdrop": 0.3}
    models = (
        make_model("gpt2", tmp_path / "student", 0, **rates),
        make_model("gpt2", tmp_path / "teacher", 1),
    )
    config = make_recipe(*models, tmp_path, **{"model.gradient_checkpointing": True})
    trainer = Trainer(config, progress=False)
    assert trainer.student.model.training
    for module in trainer.student.modules():
        assert not isinstance(module, torch.nn.Dropout) or module.p == 0
    final = trainer.train().final
    exported = json.loads((final / "config.json").read_text())
    assert {name: exported[name] for name in rates} == rates


def test_dropout_of_a_config_within_the_config_is_off_and_can_be_restored() -> None:
    inner = {"attn_config": {"attn_pdrop": 0.5}, "resid_pdrop": 0.25}
    config = AutoConfig.for_model("dbrx", **inner)
    before = config.to_dict()
    rates = dropout_rates(before)
    assert (rates["resid_pdrop"], rates["attn_config"]) == (0.25, {"attn_pdrop": 0.5})
    loading._switch_dropout_off(config)
    assert config.resid_pdrop == config.attn_config.attn_pdrop == 0
    assert with_dropout(config.to_dict(), rates) == before


@pytest.mark.parametrize("kind", ["gpt2", "mpt", "qwen2", "codegen", "opt"])
def test_the_context_is_known_by_whichever_name(kind: str) -> None:
    assert loading.context_length(make_config(kind, 320)) == 256


def test_the_context_of_gpt2_bounds_prompts(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "long.jsonl", "x" * 300, "y")
    with pytest.raises(UsageError, match=r"data.prompts row 0: .* student's context of 256 tokens"):
        train(tmp_path, "gpt2", **{"data.prompts": data})


def test_tokens_outside_the_embedding_are_refused_where_they_are_used(tmp_path: Path) -> None:
    models = pair(tmp_path, extra=80)  # 339 tokens, of which 320 have an embedding
    data = write_rows(tmp_path / "new.jsonl", "a", "<new_79> b", "c", "d")
    with pytest.raises(UsageError, match=r"data.prompts row 1: token id 338 .* of 320 tokens"):
        train(tmp_path, models=models, **{"data.prompts": data})
    assert train(tmp_path, models=models).steps == 2


# Decoding with the caches of hybrid models.


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "falcon_h1", "jamba", "granitemoehybrid"])
@pytest.mark.filterwarnings("default")
def test_completions_that_end_at_different_times_are_those_of_one_alone(
    tmp_path: Path, kind: str
) -> None:
    model = loading.load_model(str(make_model(kind, tmp_path)), "float32")
    engine = TransformersEngine(model, vocab_size=320)
    engine.check_decoding()
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15]]
    requests = [Request(Prompt(i, p, p), i, 0, seed=i) for i, p in enumerate(prompts)]
    sampling = Sampling(12, stop_ids=tuple(range(3, 90)))
    together = sorted(engine.generate(requests, sampling), key=lambda r: r.key)
    assert len({len(r.completion_ids) for r in together}) > 1
    for request, rollout in zip(requests, together, strict=True):
        (alone,) = engine.generate([request], sampling)
        assert alone.completion_ids == rollout.completion_ids
        torch.testing.assert_close(
            torch.tensor(alone.sampling_log_probs),
            torch.tensor(rollout.sampling_log_probs),
            atol=2e-3,
            rtol=0,
        )


def test_a_decoder_that_ignores_its_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loading.load_model(str(make_model("qwen2", tmp_path)), "float32")
    engine, forward = TransformersEngine(model, vocab_size=320), type(model).forward

    def forgetful(self: Any, past_key_values: Any = None, **inputs: Any) -> Any:
        if inputs.get("use_cache"):
            inputs |= {"attention_mask": None, "position_ids": None, "use_cache": False}
        return forward(self, **inputs)

    monkeypatch.setattr(type(model), "forward", forgetful)
    with pytest.raises(UsageError, match="with a cache gives other log-probs than its forward"):
        engine.check_decoding()


# Exports.


def test_sampling_settings_without_do_sample_are_no_hindrance(tmp_path: Path) -> None:
    models = pair(tmp_path, generation={"temperature": 0.6, "top_p": 0.95})
    final = train(tmp_path, models=models).final
    found = GenerationConfig.from_pretrained(final)
    assert (found.temperature, found.do_sample, found.eos_token_id) == (0.6, True, [TURN_END])


# Stops.


def test_an_eos_id_that_the_tokenizer_does_not_know_is_named_by_its_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = make_model("qwen2", tmp_path / "student", 0, eos=[TURN_END, 300])
    config = make_recipe(student, make_model("qwen2", tmp_path / "teacher", 1), tmp_path)
    trainer = Trainer(config)
    assert "the student ends a turn with <|im_end|> or id 300, the teacher" in caplog.text
    assert trainer.train().steps == 2


@pytest.mark.parametrize("template", [CHATML, PARTS, NEEDS_SYSTEM, NEEDS_SYSTEM + PARTS])
def test_the_stop_of_a_template_is_found_in_whichever_form_it_takes(template: str) -> None:
    tokenizer = make_byte_tokenizer(template)
    tokenizer.eos_token = "<|endoftext|>"
    assert stops.stop_ids(tokenizer, GenerationConfig()) == [END_OF_TEXT, TURN_END]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}",  # leaves all texts out
        "{{ messages[0]['nothing'].at.all }}",
    ],
)
def test_a_template_that_shows_no_stop_gives_none(template: str) -> None:
    tokenizer = make_byte_tokenizer(template)
    found = stops.stop_ids(tokenizer, GenerationConfig())
    assert found == [TURN_END]
    assert TURN_START not in found


# Templates and prompts.


def test_a_template_that_needs_a_system_turn_says_so_and_works_with_one(tmp_path: Path) -> None:
    models = pair(tmp_path, template=NEEDS_SYSTEM)
    with pytest.raises(UsageError, match="its chat template fails: a system turn is needed"):
        train(tmp_path, models=models)
    with_system = {"data.system": "Be brief.", "run.dir": str(tmp_path / "with")}
    assert train(tmp_path, models=models, **with_system).steps == 2
    plain = {"data.chat": None, "run.dir": str(tmp_path / "plain")}
    assert train(tmp_path, models=models, **plain).steps == 2


def test_a_template_of_content_parts_is_given_parts(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer(PARTS)
    (ids,) = chat.encode_chat(tokenizer, ["2+2?"], {}, "Be brief.")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<|im_start|>user\n<|im_end|>", "leaves the user's text out, given as text and as"),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'][:9] }}"),
            "leaves the prompt's text out or changes it: 'A long question",
        ),
    ],
)
def test_a_template_that_leaves_the_text_out_is_refused(template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chat.encode_chat(make_byte_tokenizer(template), ["A long question"], {})


class Framed:
    """A tokenizer that puts its tokens around every text, as some do."""

    def __init__(self, before: Sequence[int] = (), after: Sequence[int] = ()) -> None:
        self.inner = make_byte_tokenizer()
        self.before, self.after = list(before), list(after)
        self.bos_token, self.bos_token_id = "<|endoftext|>", END_OF_TEXT
        self.eos_token, self.eos_token_id = "<|im_end|>", TURN_END

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*self.before, *self.inner(text)["input_ids"], *self.after]}


@pytest.fixture
def _anew() -> None:
    """Notices are given once a process."""
    chat._notify.cache_clear()


@pytest.mark.usefixtures("_anew")
def test_rendered_prompts_get_no_second_bos_and_the_user_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = Framed(before=[END_OF_TEXT])
    rendered, plain = chat.encode_chat(tokenizer, ["<|endoftext|>Hi", "Hi"], None)
    assert rendered == plain
    assert rendered.count(END_OF_TEXT) == 1
    assert caplog.text.count("prompts begin with <|endoftext|> already") == 1


@pytest.mark.usefixtures("_anew")
def test_an_eos_that_the_tokenizer_appends_is_left_out_and_one_that_is_written_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = Framed(after=[TURN_END])
    own, written = chat.encode_chat(tokenizer, ["Hi", "Hi<|im_end|>"], None)
    assert TURN_END not in own
    assert written[: len(own)] == own
    assert written[-1] == TURN_END
    assert "the tokenizer ends every text with <|im_end|>" in caplog.text


@pytest.mark.usefixtures("_anew")
def test_prompts_rendered_already_are_noticed_under_a_chat(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = make_byte_tokenizer()
    chat.encode_chat(tokenizer, ["What does im_start mean?", "a < b"], {})
    assert not caplog.records
    chat.encode_chat(tokenizer, ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"], {})
    assert "look rendered already" in caplog.text
    assert "set data.chat=null" in caplog.text


@pytest.mark.parametrize("same", [True, False])
def test_two_templates_are_said(
    tmp_path: Path, same: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other = CHATML if same else "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    student = make_model("qwen2", tmp_path / "student", 0, template=other)
    teacher = make_model("qwen2", tmp_path / "teacher", 1)
    Trainer(make_recipe(student, teacher, tmp_path))
    assert ("set data.teacher_column=problem" in caplog.text) != same


# Runs in which nothing can be learned.


@pytest.mark.parametrize(
    ("overrides", "models", "expected"),
    [
        ({"rollout.max_new_tokens": 1}, "s", "ran into rollout.max_new_tokens=1"),
        ({"model.student": "t"}, "t", "every gradient of the first steps is 0"),
        ({"reward.name": "power", "reward.alpha": 1e9}, "s", "have reward 0 at alpha 1e+09"),
    ],
)
def test_a_run_in_which_nothing_can_be_learned_is_said(
    tmp_path: Path,
    overrides: dict[str, Any],
    models: str,
    expected: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    teacher = make_model("qwen2", tmp_path / "teacher", 1)
    student = teacher if models == "t" else make_model("qwen2", tmp_path / "student", 0)
    overrides = {k: v for k, v in overrides.items() if k != "model.student"}
    train(tmp_path, models=(student, teacher), **overrides)
    assert expected in caplog.text


def test_a_run_that_learns_is_given_no_hint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eos = list(range(3, 60))
    result = train(tmp_path, models=pair(tmp_path, eos=eos), **{"rollout.max_new_tokens": 16})
    assert not caplog.records
    assert len(RunDirectory(result.run_dir).metrics()) == 2


def test_empty_completions_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = pair(tmp_path, eos=list(range(320)))  # every token ends a turn
    train(tmp_path, models=models)
    assert "nothing was trained in the first steps: every completion is empty" in caplog.text
