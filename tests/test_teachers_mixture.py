"""Mixtures of teachers, weights of several teachers, and the manifest of all of them."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollout_cases import make_rollout
from teacher_server import NAME, TeacherServer
from transformers import AutoTokenizer

from poweropd import Config, Trainer
from poweropd.data.rollout import Example, make_example
from poweropd.errors import UsageError
from poweropd.models import fingerprints
from poweropd.teachers import base
from poweropd.teachers.local import LocalTeacher
from poweropd.teachers.mixture import MixedTeacher
from poweropd.training import checkpoint
from poweropd.training.build import RunInputs

MAKES = Callable[..., Config]


@pytest.fixture
def several(recipe: MAKES, teacher_dir: Path, code_dir: Path, domains: Path) -> MAKES:
    """A recipe with two teachers, by column or as a mixture, whose weights are 3 and 1."""

    def make(how: dict[str, Any], weights: tuple[float, float] = (3.0, 1.0), **keys: Any) -> Config:
        models = {"math": teacher_dir, "code": code_dir}
        teachers: dict[str, Any] = {**how}
        for (name, model), weight in zip(models.items(), weights, strict=True):
            teachers[name] = {"model": str(model), "dtype": "float32", "weight": weight}
        return recipe(**{"teacher": teachers, "data.prompts": str(domains), **keys})

    return make


class Fixed:
    """Gives every example the same log-probs, entropies and most probable tokens."""

    def __init__(self, log_probs: list[float]) -> None:
        self.log_probs, self.waiting = torch.tensor(log_probs), list[Example]()

    def submit(self, example: Example) -> None:
        self.waiting.append(example)

    def collect(self) -> list[Example]:
        waiting, self.waiting = self.waiting, []
        known = torch.zeros(len(self.log_probs))
        return [e.scored(self.log_probs, known, known.bool()) for e in waiting]


def example(tokens: int) -> Example:
    made = make_example(make_rollout(0, [1], range(5, 5 + tokens)), (), (0,), "raw")
    assert made is not None
    return made


LOG_PROB = st.one_of(st.just(-math.inf), st.floats(-80, 0))


@given(st.lists(st.tuples(LOG_PROB, LOG_PROB, LOG_PROB), min_size=1, max_size=6), st.data())
def test_a_mixture_is_the_mean_of_probabilities(
    rows: list[tuple[float, float, float]], data: st.DataObject
) -> None:
    weights = [data.draw(st.floats(0.01, 100)) for _ in range(3)]
    parts = {name: Fixed([row[k] for row in rows]) for k, name in enumerate("abc")}
    mixture = MixedTeacher(parts, dict(zip("abc", weights, strict=True)))
    (found,) = base.score(mixture, [example(len(rows))])
    given_probs = np.exp(np.array(rows, dtype=np.float32).astype(np.float64))
    share = np.array(weights) / np.sum(weights)
    with np.errstate(divide="ignore"):
        expected = np.log(given_probs @ share)
    np.testing.assert_allclose(found.teacher_log_probs.double(), expected, rtol=1e-6, atol=1e-6)
    assert (found.teacher_entropy, found.teacher_top1) == (None, None)
    assert mixture.shares.sum().item() == pytest.approx(len(rows))
    posterior = given_probs * share
    totals = posterior.sum(1, keepdims=True)
    posterior = np.where(totals > 0, posterior / np.where(totals > 0, totals, 1), share)
    np.testing.assert_allclose(mixture.shares, posterior.sum(0), rtol=1e-5, atol=1e-9)


def test_a_run_is_scored_by_its_mixture_which_of_equal_teachers_is_one(several: MAKES) -> None:
    trainer = Trainer(several({"mix": True}), progress=False)
    assert isinstance(trainer.teacher, MixedTeacher)
    found = trainer.scored(trainer.sample(0))
    alone = {
        name: base.score(LocalTeacher(teacher, 4096), found)
        for name, teacher in trainer.models.teachers.items()
    }
    for mixed, math_, code in zip(found, alone["math"], alone["code"], strict=True):
        own = [one.teacher_log_probs.double().exp() for one in (math_, code)]
        expected = (0.75 * own[0] + 0.25 * own[1]).log().float()
        torch.testing.assert_close(mixed.teacher_log_probs, expected, rtol=1e-6, atol=1e-6)
    again = [LocalTeacher(trainer.models.teachers["math"], 4096) for _ in range(2)]
    same = MixedTeacher(dict(zip("ab", again, strict=True)), {"a": 2.0, "b": 5.0})
    for one, other in zip(base.score(same, found), alone["math"], strict=True):
        torch.testing.assert_close(one.teacher_log_probs, other.teacher_log_probs)
    row = trainer.step(0)
    assert row["teacher/math/share"] + row["teacher/code/share"] == pytest.approx(1.0)
    assert 0 < row["teacher/code/share"] < 1


@pytest.mark.thorough
def test_one_part_of_a_mixture_may_be_served(
    several: MAKES, code_dir: Path, tmp_path: Path
) -> None:
    here = several({"mix": True}, **{"train.steps": 2})
    with TeacherServer(code_dir) as server:
        code = {"model": NAME, "servers": [server.url], "tokenizer": str(code_dir)}
        teachers = {**here.teacher.model_dump(), "code": code}
        tree = here.model_dump() | {"teacher": teachers, "run": {"dir": str(tmp_path / "served")}}
        losses = []
        for config in (here, Config.from_dict(tree)):
            Trainer(config, progress=False).train()
            lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["loss"] for line in lines])
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_teachers_weight_is_a_factor_of_its_tokens_loss(several: MAKES, tmp_path: Path) -> None:
    gradients, losses = {}, {}
    for weights in ((1.0, 1.0), (3.0, 1.0), (1.0, 3.0)):
        keys = {"run.dir": str(tmp_path / f"{weights}")}
        trainer = Trainer(several({"by": "domain"}, weights, **keys), progress=False)
        examples = trainer.scored(trainer.sample(0))
        assert {e.prompt.domain: e.loss_weight for e in examples} == {
            "math": weights[0],
            "code": weights[1],
        }
        tokens = sum(e.num_tokens for e in examples)
        losses[weights], _ = trainer.updater.accumulate(examples, trainer.reward, tokens)
        parameters = trainer.student.trained_weights().values()
        gradients[weights] = torch.cat([p.grad.flatten().double() for p in parameters])
    # Linear in each weight: (3, 1) and (1, 3) together are four times (1, 1).
    assert losses[3.0, 1.0] + losses[1.0, 3.0] == pytest.approx(4 * losses[1.0, 1.0], abs=1e-6)
    total = gradients[3.0, 1.0] + gradients[1.0, 3.0]
    torch.testing.assert_close(total, 4 * gradients[1.0, 1.0], rtol=1e-4, atol=1e-8)
    assert not torch.allclose(gradients[3.0, 1.0], 2 * gradients[1.0, 1.0], rtol=1e-2)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", [{"by": "domain"}, {"mix": True}])
def test_the_manifest_counts_what_each_teacher_scored(
    several: MAKES, how: dict[str, Any], teacher_dir: Path
) -> None:
    config = several(how, **{"train.steps": 2})
    for until in (1, None):
        Trainer(config, progress=False).train(until=until)
    run = Path(config.run.dir)
    _, _, state = checkpoint.load_checkpoint(run / "checkpoints" / "step-2")
    math_, code = state["teachers"]
    assert (math_["name"], code["name"]) == ("math", "code")
    assert (math_["model"], math_["servers"]) == (str(teacher_dir), [])
    assert math_["fingerprint"] == fingerprints.of_weights(str(teacher_dir)) != code["fingerprint"]
    assert (math_["weight"], code["weight"]) == (3.0, 1.0)
    for row in (math_, code):
        key = "num_tokens" if "mix" in how else f"teacher/{row['name']}/tokens"
        assert row["tokens"] == sum(step[key] for step in rows_of(run)) > 0
    card = (run / "final" / "README.md").read_text()
    assert f"| math: `teacher` | 3.0 | {math_['tokens']:,} | {math_['fingerprint']} |" in card


def test_a_single_teacher_is_in_the_manifest_too(recipe: MAKES) -> None:
    config = recipe(**{"train.steps": 1, "objective.select": {"name": "random", "keep": 0.5}})
    Trainer(config, progress=False).train()
    run = Path(config.run.dir)
    _, _, state = checkpoint.load_checkpoint(run / "checkpoints" / "step-1")
    (row,), (step,) = state["teachers"], rows_of(run)
    assert row["name"] is None
    # It scores all tokens, of which the selection leaves half.
    assert row["tokens"] == round(step["num_tokens"] / step["select/fraction"])
    assert f"| `teacher` | 1.0 | {row['tokens']:,} |" in (run / "final" / "README.md").read_text()


def test_teachers_of_a_mixture_must_share_the_vocabulary(
    several: MAKES, code_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(code_dir)
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = tree["model"]["vocab"]
    first, second = (token for token, i in vocab.items() if i in (60, 61))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    other.mkdir()
    for path in code_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer.json").write_text(json.dumps(tree))
    config = several({"mix": True})
    code = config.teachers["code"].model_copy(update={"model": str(other)})
    teachers = {**config.teacher.model_dump(), "code": code.model_dump()}
    config = Config.from_dict(config.model_dump() | {"teacher": teachers})
    with pytest.raises(UsageError, match=r"teacher.code: student and teacher must share one") as e:
        RunInputs.load(config)
    assert "\n" not in str(e.value)


def test_all_teachers_of_a_mixture_must_have_room(several: MAKES) -> None:
    config = several({"mix": True}, **{"rollout.max_new_tokens": 250})
    with pytest.raises(UsageError, match=r"data.prompts row 0: .* exceed the"):
        RunInputs.load(config)


@pytest.mark.parametrize(
    ("teacher", "keys", "message"),
    [
        ({"mix": True, "a": {"model": "x"}}, {}, "teacher.mix: expected at least two teachers"),
        ({"mix": False, "a": {"model": "x"}}, {}, "teacher.by: expected either a column, or mix"),
        ({"mix": True, "by": "c", "a": {"model": "x"}}, {}, "teacher.by: expected either a colu"),
        ({"model": "x", "weight": 2.0}, {}, "teacher.weight: it belongs to one of several"),
        ({"mix": True, "a": {"model": "x", "weight": 0}}, {}, "teacher.a.weight: expected greater"),
        (None, {"objective.kind": "full_vocab"}, "full_vocab needs the teacher's hidden states"),
        (None, {"objective.baseline": "value"}, "value needs the teacher's hidden states"),
        (None, {"data.teacher_column": "hint"}, "teacher.mix: all teachers read the student"),
        (None, {"data.holdout": 2}, "evaluate.divergence: a mixture of teachers"),
    ],
)
def test_what_a_mixture_cannot_be_is_refused(
    several: MAKES, recipe: MAKES, teacher: dict[str, Any] | None, keys: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        several({"mix": True}, **keys) if teacher is None else recipe(teacher=teacher, **keys)


def test_an_example_keeps_its_weight_through_a_batch() -> None:
    from poweropd.data.batch import collate

    first = replace(example(2), loss_weight=2.5).scored(torch.zeros(2))
    batch = collate([first, example(1).scored(torch.zeros(1))])
    assert sorted(batch.loss_weights.tolist()) == [1.0, 2.5, 2.5]
