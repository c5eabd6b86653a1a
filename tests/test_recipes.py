"""The shipped recipes load, are planned and train, and the README's snippets do what they say."""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
from tiny_models import make_model
from turn_cases import TOOLS

from poweropd import Config, Trainer
from poweropd.config.recipe_file import read_yaml
from poweropd.embedded import task
from poweropd.plan import command

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    config = Config.load(path)
    assert config.run.dir == f"runs/{path.stem}"
    assert config.reward.create()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_planned_offline_and_fits_one_gpu(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    counted = ["train.steps=60"] if path.stem == "own-task" else []  # its prompts are the reader's
    options = command.Options(gpu="H100", tokens_per_second=1000)
    plan = command.make_plan(Config.load(path, counted), options)
    assert plan.failed == []
    assert plan.gpus_needed == 1
    hours = plan.estimates[0].gpu_hours(plan.config.train.steps)
    assert hours is not None
    assert hours > 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "paper").iterdir()), ids=lambda p: p.stem
)
def test_the_papers_numbers_are_in_its_recipes_and_not_in_the_defaults(path: Path) -> None:
    tree = read_yaml(path)
    numbers = {"steps": 1500, "prompts_per_step": 32, "learning_rate": 5e-7, "seed": 42}
    assert numbers.items() <= tree["train"].items()
    assert tree["rollout"] == {"max_new_tokens": 1024, "top_p": 0.95, "top_k": 20}
    assert tree["reward"] == {"name": "power", "alpha": 5.0}
    assert tree["model"]["dtype"] == tree["teacher"]["dtype"] == "bfloat16"


def test_the_quickstart_fits_a_gpu_of_24_gb_with_an_offloaded_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = Config.load(ROOT / "recipes" / "quickstart.yaml", ["teacher.offload=true"])
    assert command.make_plan(config, command.Options(gpu="L4")).gpus_needed == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_trains_two_steps_with_tiny_models(
    path: Path, student_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    own = Config.load(path)
    teacher = {"teacher.model": teacher_dir, "teacher.dtype": "float32"}
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"problem": p.problem, "question": p.problem, "answer": p.answer, "work": p.answer}
        for p in task.problems("train", 16)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = {
        "run.dir": tmp_path / "run",
        "model.student": student_dir,
        "model.dtype": "float32",
        **({"model.student": "embedded:student"} if own.self_teacher else teacher),
        "data.prompts": prompts,
        "data.column": "problem",
        "data.holdout": 0,
        "rollout.engine": "transformers",
        "rollout.max_new_tokens": 6,
        "train.steps": 2,
        "train.prompts_per_step": 2,
        "evaluate": "null",
    }
    if path.stem == "tools":  # which need a template that shows them
        for key, seed in {"model.student": 1, "teacher.model": 2}.items():
            room = {"max_position_embeddings": 2048}
            tiny[key] = make_model("qwen3", tmp_path / key, seed, template=TOOLS, **room)
    config = Config.load(path, [f"{key}={value}" for key, value in tiny.items()])
    result = Trainer(config, progress=False).train()
    assert result.steps == 2
    weights = "model.safetensors" if config.model.lora is None else "adapter_model.safetensors"
    assert (tmp_path / "run" / "final" / weights).exists()


def test_the_recipe_in_the_readme_is_the_quickstart(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shown = tmp_path / "quickstart.yaml"
    shown.write_text(text)
    assert Config.load(shown) == Config.load(ROOT / "recipes" / "quickstart.yaml")


def test_the_snippets_in_the_readme_run() -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec("\n".join(snippets), names)
    assert names["student_log_probs"].grad.abs().sum() > 0
    assert names["advantages"].abs().max() <= 1
