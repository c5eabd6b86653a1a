"""Keys of the run, the student, the data and the training do what the reference says of them.

`tests/test_keys_table.py` says which test proves which key.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from poweropd import Config, Trainer
from poweropd.errors import UsageError
from poweropd.training.build import RunInputs

MAKES = Callable[..., Config]


@pytest.fixture
def trained(recipe: MAKES, tmp_path: Path) -> Callable[..., tuple[Trainer, list[dict[str, Any]]]]:
    """Trains a recipe in a run directory of its own; returns the trainer and its metrics."""
    number = iter(range(100))

    def make(**overrides: Any) -> tuple[Trainer, list[dict[str, Any]]]:
        folder = str(tmp_path / f"run-{next(number)}")
        trainer = Trainer(recipe(**{"run.dir": folder, **overrides}), progress=False)
        trainer.train()
        return trainer, trainer.run.metrics()

    return make


def rates(rows: list[dict[str, Any]]) -> list[float]:
    return [row["learning_rate"] for row in rows]


def weights(trainer: Trainer) -> torch.Tensor:
    tensors = load_file(trainer.run.final / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
        ("constant", 2, [0.0, 0.5, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 2, [0.0, 0.5, 1.0, 0.5]),
        ("cosine", 2, [0.0, 0.5, 1.0, 0.5]),
    ],
)
def test_the_learning_rate_follows_its_schedule_and_warm_up(
    trained: Any, schedule: str, warmup: int, expected: list[float]
) -> None:
    keys = {"train.steps": 4, "train.schedule": schedule, "train.warmup_steps": warmup}
    _, rows = trained(**keys, **{"train.learning_rate": 0.01})
    assert rates(rows) == pytest.approx([0.01 * share for share in expected])


def test_the_rate_that_is_reported_is_the_one_that_trains(trained: Any) -> None:
    """At rate 0 nothing moves, so the first step of a warm-up leaves the student as it was."""
    start, _ = trained(**{"train.steps": 1, "train.warmup_steps": 10})
    small, _ = trained(**{"train.steps": 1, "train.learning_rate": 1e-4})
    large, _ = trained(**{"train.steps": 1, "train.learning_rate": 1e-2})
    moved = [(weights(one) - weights(start)).norm().item() for one in (small, large)]
    assert 0 < moved[0] < moved[1] / 20


def test_weight_decay_pulls_towards_zero(trained: Any) -> None:
    plain, decayed = (
        trained(**{"train.learning_rate": 1e-2, "train.weight_decay": decay})[0]
        for decay in (0.0, 5.0)
    )
    assert weights(decayed).norm() < 0.95 * weights(plain).norm()


def test_clipping_bounds_the_gradient_that_trains(trained: Any) -> None:
    """AdamW ignores the scale of all gradients together, but not that of one step among others."""
    free, tight = (
        trained(**{"train.clip_grad_norm": bound, "reward": {"name": "log_ratio"}})
        for bound in (None, 1e-6)
    )
    assert free[1][0]["grad_norm"] == tight[1][0]["grad_norm"] > 1e-3  # as it was before clipping
    assert not torch.equal(weights(free[0]), weights(tight[0]))


def test_the_seed_decides_prompts_and_completions(trained: Any) -> None:
    same, again, other = (
        trained(**{"train.seed": seed, "train.steps": 1})[1][0]["reward/mean"] for seed in (1, 1, 2)
    )
    assert same == again != other


def test_so_many_prompts_and_completions_make_a_step(recipe: MAKES) -> None:
    keys = {"train.prompts_per_step": 3, "rollout.per_prompt": 2, "rollout.max_new_tokens": 5}
    trainer = Trainer(recipe(**keys), progress=False)
    rollouts = list(trainer.sample(0))
    assert len(rollouts) == 6
    assert len({rollout.request.prompt.index for rollout in rollouts}) == 3
    assert max(len(rollout.completion_ids) for rollout in rollouts) == 5
    texts = {tuple(r.completion_ids) for r in rollouts if r.request.prompt_index == 0}
    assert len(texts) == 2  # two completions of a prompt are not the same one


def test_temperature_and_truncation_change_what_is_sampled(recipe: MAKES) -> None:
    def sampled(**keys: Any) -> list[list[int]]:
        trainer = Trainer(recipe(**{"train.prompts_per_step": 8, **keys}), progress=False)
        found = sorted(trainer.sample(0), key=lambda rollout: rollout.key)
        return [rollout.completion_ids for rollout in found]

    free, greedy = sampled(), sampled(**{"rollout.temperature": 0.0})
    assert sampled(**{"rollout.top_k": 1}) == greedy != free
    assert sampled(**{"rollout.top_p": 1e-6}) == greedy
    assert sampled(**{"rollout.temperature": 2.0}) not in (free, greedy)
    assert sampled(**{"rollout.batch_size": 3}) == free  # how many at once changes nothing


def test_held_out_prompts_are_kept_out_of_training_and_stay_the_same(recipe: MAKES) -> None:
    config = recipe(**{"data.holdout": 24})
    trainer = Trainer(config, progress=False)
    held = {prompt.index for prompt in trainer.inputs.holdout}
    assert len(held) == 24
    assert len(trainer.inputs.prompts) == 40
    assert not held & {p.index for step in range(20) for p in trainer.prompts(step)}
    trainer.train(until=1)
    recorded = json.loads((trainer.run.path / "inputs.json").read_text())
    assert "the held-out prompts of data.prompts" in recorded
    again = Trainer(config, progress=False)
    assert again.inputs.holdout == trainer.inputs.holdout
    assert again.train().steps == 3


def test_prompts_that_are_too_long_are_refused_or_left_out(
    recipe: MAKES, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = ["1+2", "1+" * 200 + "2", "3+4", "5+6"]
    path.write_text("".join(json.dumps({"problem": text}) + "\n" for text in texts))
    own = {"data.prompts": str(path)}
    with pytest.raises(UsageError, match=r"row 1: .* set data\.filter_longer=true to leave such"):
        Trainer(recipe(**own), progress=False)
    with caplog.at_level("WARNING", "poweropd"):
        trainer = Trainer(recipe(**own, **{"data.filter_longer": True}))
    assert [prompt.index for prompt in trainer.inputs.prompts] == [0, 2, 3]
    assert "data.filter_longer: dropped 1 of 4 prompts" in caplog.text
    long = {"data.filter_longer": True, "rollout.max_new_tokens": 255}
    with pytest.raises(UsageError, match=r"filter_longer: all 4 prompts are too long"):
        Trainer(recipe(**own, **long), progress=False)


def test_only_the_first_rows_are_read(recipe: MAKES) -> None:
    trainer = Trainer(recipe(**{"data.limit": 5}), progress=False)
    assert [prompt.index for prompt in trainer.inputs.prompts] == [0, 1, 2, 3, 4]


def test_epochs_stand_for_the_steps_that_they_take(
    recipe: MAKES, caplog: pytest.LogCaptureFixture
) -> None:
    tree = recipe(**{"data.holdout": 54}).model_dump()
    tree["train"] |= {"steps": None, "epochs": 1.5}
    config = Config.from_dict(tree)
    with caplog.at_level("INFO", "poweropd"):
        trainer = Trainer(config)
    assert "4 steps of 4 prompts are 1.6 epochs of 10 prompts" in caplog.text
    assert trainer.train().steps == 4  # 15 prompts
    assert trainer.run.config().train.steps == 4
    assert Trainer(config, progress=False).run.is_complete  # the same recipe finds its run
    tree["train"]["steps"] = 3
    with pytest.raises(UsageError, match=r"train\.epochs: expected train\.steps or train\.epochs"):
        Config.from_dict(tree)


def test_a_run_goes_on_if_its_column_is_named(recipe: MAKES) -> None:
    Trainer(recipe(), progress=False).train(until=1)
    assert Trainer(recipe(**{"data.column": "problem"}), progress=False).train().steps == 3


def test_prompts_come_in_the_order_that_the_recipe_says(recipe: MAKES) -> None:
    plain = Trainer(recipe(**{"data.shuffle": False}), progress=False)
    assert [prompt.index for prompt in plain.prompts(1)] == [4, 5, 6, 7]
    shuffled = [p.index for p in Trainer(recipe(), progress=False).prompts(1)]
    assert shuffled != [4, 5, 6, 7]
    assert len(set(shuffled)) == 4


def test_column_system_and_chat_make_the_prompt(recipe: MAKES, tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text(json.dumps({"question": "1+1", "problem": "9+9"}) + "\n")

    def first(**keys: Any) -> str:
        own = {"data.prompts": str(data), "data.column": "question", **keys}
        trainer = Trainer(recipe(**own, **{"train.prompts_per_step": 1}), progress=False)
        return str(trainer.inputs.tokenizer.decode(trainer.inputs.prompts[0].prompt_ids))

    turn = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert first() == turn
    assert first(**{"data.system": "Add."}) == f"<|im_start|>system\nAdd.<|im_end|>\n{turn}"
    assert first(**{"data.chat": None}) == "1+1"


def test_checkpoints_are_written_and_kept_as_often_as_said(trained: Any) -> None:
    keys = {"train.steps": 7, "checkpoint": {"every": 2, "keep": 3}}
    trainer, _ = trained(**keys)
    found = sorted(path.name for path in trainer.run.checkpoints.iterdir())
    assert found == ["step-4", "step-6", "step-7"]


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "F32"), ("bfloat16", "BF16")])
def test_the_student_is_exported_in_its_dtype(trained: Any, dtype: str, expected: str) -> None:
    trainer, _ = trained(**{"model.dtype": dtype, "train.steps": 1})
    header = (trainer.run.final / "model.safetensors").read_bytes()[8:4096]
    assert f'"dtype":"{expected}"'.encode() in header
    assert next(trainer.student.parameters()).dtype == torch.float32  # the master weights


def test_lora_has_its_rank_scale_and_targets(recipe: MAKES) -> None:
    lora = {"r": 3, "alpha": 12.0, "target_modules": ["q_proj"]}
    trainer = Trainer(recipe(**{"model.lora": lora}), progress=False)
    shapes = {name: tuple(p.shape) for name, p in trainer.student.trained_weights().items()}
    assert shapes
    assert all("q_proj" in name and 3 in shape for name, shape in shapes.items())
    (config,) = trainer.student.model.peft_config.values()
    assert config.lora_alpha / config.r == 4.0


def test_a_run_is_kept_in_its_directory(recipe: MAKES, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "own"
    Trainer(recipe(**{"run.dir": str(folder), "train.steps": 1}), progress=False).train()
    found = {path.name for path in folder.iterdir()}
    assert found >= {"config.yaml", "metrics.jsonl", "rewards", "checkpoints", "final"}
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_the_student_is_the_named_one(recipe: MAKES, student_dir: Path, teacher_dir: Path) -> None:
    for folder in (student_dir, teacher_dir):
        trainer = Trainer(recipe(**{"model.student": str(folder)}), progress=False)
        loaded, named = trainer.student.trained_weights(), load_file(folder / "model.safetensors")
        table = next(name for name in loaded if name.endswith("embed_tokens.weight"))
        assert torch.equal(loaded[table], named["model.embed_tokens.weight"])
        shutil.rmtree(trainer.run.path)


def test_weights_and_optimizer_are_kept_in_the_master_dtype(recipe: MAKES) -> None:
    dtypes = {"model.dtype": "bfloat16", "model.master_dtype": "bfloat16"}
    trainer = Trainer(recipe(**dtypes), progress=False)
    trainer.step(0)
    moments = [s["exp_avg"] for s in trainer.updater.optimizer.state.values()]
    kept = [*trainer.student.trained_weights().values(), *moments]
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_student_and_teacher_attend_as_said(recipe: MAKES, attention: str) -> None:
    trainer = Trainer(recipe(**{"model.attention": attention}), progress=False)
    for model in (trainer.student, trainer.models.teacher):
        assert model.causal_lm.config._attn_implementation == attention


OWN_CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM

class OwnConfig(Qwen3Config):
    model_type = "own"

class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("who", ["model.student", "teacher.model", "reference.model"])
def test_code_of_a_repository_runs_only_where_it_is_trusted(
    recipe: MAKES,
    student_dir: Path,
    tmp_path: Path,
    who: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    own = tmp_path / "own"
    shutil.copytree(student_dir, own)
    (own / "code.py").write_text(OWN_CODE)
    code = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    config = json.loads((own / "config.json").read_text()) | {"model_type": "own"}
    (own / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    keys = {"reward": {"name": "extrapolate"}} if who == "reference.model" else {}
    with pytest.raises(UsageError, match="contains custom code"):
        Trainer(recipe(**{**keys, who: str(own)}), progress=False)
    trust = f"{who.partition('.')[0]}.trust_remote_code"
    trainer = Trainer(recipe(**{**keys, who: str(own), trust: True}), progress=False)
    models = trainer.models
    model = {
        "model.student": models.student,
        "teacher.model": models.teacher,
        "reference.model": models.reference,
    }[who]
    assert model is not None
    assert type(model.causal_lm).__name__ == "OwnModel"


def shapes_read(model: Any) -> list[torch.Size]:
    """The shapes of all ids that a language model reads from now on."""
    shapes: list[torch.Size] = []
    table = model.get_input_embeddings()
    table.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    return shapes


def shapes_of_an_update(config: Config) -> list[torch.Size]:
    trainer = Trainer(config, progress=False)
    examples = trainer.scored(trainer.sample(0))
    shapes = shapes_read(trainer.student.causal_lm)
    trainer.updater.update(examples, trainer.reward.at(0), 0)
    return shapes


def test_a_micro_batch_keeps_to_its_tokens(recipe: MAKES) -> None:
    (whole,) = shapes_of_an_update(recipe())
    assert whole.numel() > 70
    small = shapes_of_an_update(recipe(**{"train.max_tokens_per_batch": 70}))
    assert len(small) > 1
    assert max(shape.numel() for shape in small) <= 70


def test_a_micro_batch_is_laid_out_as_said(recipe: MAKES) -> None:
    (padded,) = shapes_of_an_update(recipe(**{"train.packing": "padded"}))
    (flat,) = shapes_of_an_update(recipe(**{"train.packing": "flat"}))
    assert padded[0] == 4
    assert flat[0] == 1
    assert padded[1] < flat[1] < padded.numel()
    exact = {"train.packing": "flat", "train.max_tokens_per_batch": flat.numel()}
    assert shapes_of_an_update(recipe(**exact)) == [flat]  # nothing of the budget is padding


def test_so_many_completions_are_sampled_at_once(recipe: MAKES) -> None:
    keys = {"train.prompts_per_step": 8, "rollout.batch_size": 3}
    trainer = Trainer(recipe(**keys), progress=False)
    shapes = shapes_read(trainer.student.causal_lm)
    assert len(list(trainer.sample(0))) == 8
    assert max(shape[0] for shape in shapes) == 3


def test_a_hub_dataset_is_read_in_its_split(
    recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    load = datasets.load_dataset
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def local(name: str, config: str | None, split: str, revision: str | None) -> Any:
        return load(str(tmp_path / name), config, split=split)

    monkeypatch.setattr(datasets, "load_dataset", local)
    texts = {"train": "1+1", "validation": "2+2"}
    for split, text in texts.items():
        path = tmp_path / "owner" / "sums" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"problem": text}) + "\n")
    for split, text in texts.items():
        config = recipe(**{"data.prompts": "owner/sums", "data.split": split})
        inputs = RunInputs.load(config, notify=False)
        assert [prompt.row["problem"] for prompt in inputs.prompts] == [text]
