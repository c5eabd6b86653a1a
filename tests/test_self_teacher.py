"""The student as its own teacher: by its weights before, of now, or averaged; exact in resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from poweropd import Config, Trainer
from poweropd.embedded import task
from poweropd.errors import UsageError

LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"]}
Recipe = Callable[..., Config]


@pytest.fixture(scope="module")
def hinted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts with a column that the teacher alone reads."""
    path = tmp_path_factory.mktemp("hinted") / "prompts.jsonl"
    rows = [{"problem": p.problem, "hint": p.answer} for p in task.problems("train", 16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def own(recipe: Recipe, hinted: str, tmp_path: Path) -> Recipe:
    """Makes a recipe of a self teacher that reads a hint."""

    def make(name: str, kind: str, **overrides: Any) -> Config:
        teacher = {"self": kind, "ema_decay": 0.5}
        data = {"prompts": hinted, "teacher_prompt": "{problem}={hint}"}
        common = {"run.dir": str(tmp_path / name), "train.learning_rate": 1e-2}
        common |= {"checkpoint.keep": 9, "reward.name": "log_ratio", "rollout.max_new_tokens": 6}
        return recipe(**{"teacher": teacher, "data": data, **common, **overrides})

    return make


def weights(config: Config, step: int) -> dict[str, Tensor]:
    return load_file(Path(config.run.dir) / "checkpoints" / f"step-{step}" / "student.safetensors")


def trained(config: Config) -> dict[str, Tensor]:
    """The weights after the steps of a recipe, with their average."""
    Trainer(config, progress=False).train()
    return weights(config, config.train.steps)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("ema", None),
        ("ema", LORA),
        *(pytest.param(kind, lora, marks=pytest.mark.thorough)
          for kind in ("base", "live") for lora in (None, LORA)),
    ],
)  # fmt: skip
def test_a_run_goes_on_to_the_last_bit(own: Recipe, kind: str, lora: object) -> None:
    settings = {"model.lora": lora, "objective.kind": "full_vocab" if lora else "sampled"}
    whole = trained(own("whole", kind, **settings))
    parts = own("parts", kind, **settings)
    Trainer(parts, progress=False).train(until=1)
    assert_same(trained(parts), whole)
    assert any(name.startswith("average.") for name in whole) == (kind == "ema")


@pytest.mark.parametrize(
    "kind", ["sampled", pytest.param("full_vocab", marks=pytest.mark.thorough)]
)
def test_the_base_is_the_model_that_the_adapter_was_added_to(
    own: Recipe, student_dir: Path, kind: str
) -> None:
    settings = {"model.lora": LORA, "objective.kind": kind}
    other = own("other", "base", **settings, teacher={"model": str(student_dir), "dtype": "auto"})
    assert_same(trained(own("own", "base", **settings)), trained(other))


def test_the_average_follows_every_optimizer_step(own: Recipe) -> None:
    config = own("ema", "ema")
    start = {
        n: p.clone() for n, p in Trainer(config, progress=False).student.trained_weights().items()
    }
    trained(config)
    average = {name: tensor.double() for name, tensor in start.items()}
    for step in (1, 2, 3):
        found = weights(config, step)
        for name, before in average.items():
            average[name] = 0.5 * before + 0.5 * found[name].double()
            torch.testing.assert_close(found[f"average.{name}"].double(), average[name])
    assert not torch.equal(found["average.model.norm.weight"], found["model.norm.weight"])


def test_the_teacher_reads_its_weights_and_leaves_the_students(own: Recipe) -> None:
    trainer = Trainer(own("ema", "ema"), progress=False)
    trainer.train()
    average, student = trainer.models.average, trainer.student
    assert average is not None
    live = {name: p.clone() for name, p in student.trained_weights().items()}
    examples = trainer.scored(trainer.sample(0))
    assert_same(dict(student.trained_weights()), live)
    example = examples[0]
    ids = example.prompt.teacher_prompt_ids + example.rollout.completion_ids
    for name, parameter in student.trained_weights().items():  # as another model would have them
        parameter.data.copy_(average.weights[name])
    with torch.no_grad():
        logits = student.model(input_ids=torch.tensor([ids])).logits[0].double()
    places = len(example.prompt.teacher_prompt_ids) - 1 + example.positions
    expected = logits[places].log_softmax(-1).gather(1, example.teacher_targets[:, None])[:, 0]
    assert example.teacher_log_probs is not None
    torch.testing.assert_close(example.teacher_log_probs.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sampled", "full_vocab"])
def test_without_anything_more_to_read_the_student_agrees_with_itself(
    own: Recipe, hinted: str, kind: str
) -> None:
    config = own("live", "live", data={"prompts": hinted}, **{"objective.kind": kind})
    trainer = Trainer(config, progress=False)
    trainer.train()
    rows = trainer.run.metrics()
    assert [row["log_ratio/min"] for row in rows] == [0.0] * 3
    assert [row["log_ratio/max"] for row in rows] == [0.0] * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"teacher.servers": ["http://127.0.0.1:1"]}, r"teacher\.servers: .*self=ema"),
        ({"teacher.model": "x"}, r"teacher\.model: .*self=ema"),
        ({"teacher.ema_decay": 1.0}, r"teacher\.ema_decay: expected less than 1"),
        ({"train.sharding": "fsdp2"}, r"train\.sharding: fsdp2 cannot go with teacher\.self=ema"),
        ({"model.master_dtype": "bfloat16"}, r"model\.master_dtype: expected float32"),
        (
            {"evaluate": {"benchmarks": ["embedded"], "teacher": True}},
            r"evaluate\.teacher: .*itself",
        ),
    ],
)
def test_what_cannot_go_with_it_is_refused_in_one_line(
    own: Recipe, overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        own("run", "ema", **overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_embedded_student_gains_from_its_own_steps(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "recipes" / "embedded-self.yaml"
    trainer = Trainer(Config.load(path, [f"run.dir={tmp_path / 'run'}"]), progress=False)
    trainer.train()
    before, after = (
        trainer.run.evaluation(step)["embedded"]["avg_at_k"]["mean"] for step in (0, 600)
    )
    assert after >= before + 0.10
