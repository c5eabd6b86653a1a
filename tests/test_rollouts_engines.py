"""One's own engines and task rewards, and rollouts one step ahead, in whole runs."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from poweropd import Config, Trainer
from poweropd.data.rollout import Request, Rollout
from poweropd.errors import RunError, UsageError
from poweropd.rewards import import_object
from poweropd.rollouts import ENGINES
from poweropd.rollouts.base import Sampling
from poweropd.rollouts.transformers import TransformersEngine

MAKES = Callable[..., Config]
CLOCKS = ("seconds/", "tokens_per_second", "memory/")


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


def test_the_engine_of_the_docs_trains_on_the_students_tokens_alone(
    recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parent.parent / "docs" / "rollouts.md").read_text()
    (tmp_path / "docs_engine.py").write_text(re.findall(r"```python\n(.*?)```", text, re.S)[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    config = recipe(
        **{"rollout.engine": "docs_engine:make_engine", "rollout.max_new_tokens": 90},
        **{"train.prompts_per_step": 16, "train.steps": 1},
    )
    trainer = Trainer(config, progress=False)
    rollouts = list(trainer.sample(0))
    two = [r for r in rollouts if r.completion_mask is not None]
    assert len(two) > 0
    question = trainer.engine.engine.question
    for rollout in two:
        start = rollout.completion_mask.index(False)
        assert rollout.completion_ids[start : start + len(question)] == question
    trained = sum(len(r.completion_ids) - r.stopped - len(question) * (r in two) for r in rollouts)
    (example,) = trainer.scored([two[0]])
    asked = [i for i, own in enumerate(two[0].completion_mask) if not own]
    assert not set(asked) & set(example.positions.tolist())
    assert trainer.step(0)["num_tokens"] == trained


class Copied:
    """Samples from a copy of the student, so also beside an update; remembers whose tokens."""

    concurrent = True

    def __init__(self, student: Any, config: Config, tokenizer: Any) -> None:
        self.student = student
        self.model = type(student.model)(student.model.config).eval()
        self.engine = TransformersEngine(self.model, vocab_size=student.vocab_size)
        self.sampled_by: list[float] = []

    def mark(self) -> float:
        return self.model.get_output_embeddings().weight.double().sum().item()

    def sync(self) -> None:
        self.model.load_state_dict(self.student.model.state_dict())

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        self.sampled_by.append(self.mark())
        return self.engine.generate(requests, sampling)


AHEAD = {"rollout.engine": f"{__name__}:Copied", "rollout.staleness": 1, "train.steps": 6}


@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_ahead_every_step_is_sampled_by_weights_of_so_many_steps_before(
    recipe: MAKES, staleness: int
) -> None:
    trainer = Trainer(recipe(**{**AHEAD, "rollout.staleness": staleness}), progress=False)
    engine = trainer.engine.engine
    after = [engine.mark()]
    for step in range(6):
        trainer.step(step)
        after.append(engine.mark())
    # Step s is sampled by the weights after s - n steps; the first ones have no choice.
    assert engine.sampled_by == [after[max(0, step - staleness)] for step in range(6)]
    assert len(set(after)) == 7


@pytest.mark.parametrize("staleness", [1, pytest.param(3, marks=pytest.mark.thorough)])
def test_what_was_sampled_ahead_survives_an_interruption(
    recipe: MAKES, tmp_path: Path, staleness: int
) -> None:
    ahead = {**AHEAD, "rollout.staleness": staleness}
    Trainer(recipe(**ahead), progress=False).train()
    parts = recipe(**ahead, **{"run.dir": str(tmp_path / "parts")})
    for until in (1, 4, None):
        Trainer(parts, progress=False).train(until=until)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "parts")
    on_time = recipe(**{**AHEAD, "rollout.staleness": 0, "run.dir": str(tmp_path / "on-time")})
    Trainer(on_time, progress=False).train()
    first, second, *_ = metrics(tmp_path / "on-time")
    assert first == metrics(tmp_path / "run")[0]
    assert second != metrics(tmp_path / "run")[1]


def test_an_engine_that_shares_the_students_weights_cannot_be_ahead(recipe: MAKES) -> None:
    with pytest.raises(UsageError, match=r"rollout.staleness: 1 needs an engine that samples"):
        Trainer(recipe(**{"rollout.staleness": 1}), progress=False)


class Falters:
    """Samples from the student in the first two steps and the seventh, and else stops at once."""

    concurrent = False

    def __init__(self, student: Any, config: Config, tokenizer: Any) -> None:
        self.engine = TransformersEngine(student.model, vocab_size=student.vocab_size)
        self.steps = 0

    def sync(self) -> None: ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        self.steps += 1
        if self.steps in {1, 2, 7}:
            return self.engine.generate(requests, sampling)
        stop = next(iter(sampling.stop_ids))
        return (request.rollout([stop], [-1.0], stopped=True) for request in requests)


def test_a_student_that_begins_to_stop_at_once_is_said_once(
    recipe: MAKES, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    falters = {"rollout.engine": f"{__name__}:Falters", "train.steps": 9}
    Trainer(recipe(**falters), progress=False).train()
    trained = [bool(row["num_tokens"]) for row in metrics(tmp_path / "run")]
    assert trained == [step in {1, 2, 7} for step in range(1, 10)]
    said = [r.message for r in caplog.records if "the last 3 steps trained nothing" in r.message]
    assert len(said) == 1
    assert "objective.stop=raw" in said[0]


Change = Callable[[Rollout], list[Rollout]]


def of_another(rollout: Rollout, **prompt: list[int]) -> Rollout:
    request = rollout.request
    return replace(rollout, request=replace(request, prompt=replace(request.prompt, **prompt)))


BROKEN: dict[str, tuple[Change, str]] = {
    "none": (lambda r: [], "none, nor of 3 others"),
    "twice": (lambda r: [r, r], "a rollout that was not asked for, or its second"),
    "stranger": (
        lambda r: [replace(r, request=replace(r.request, prompt_index=9))],
        "prompt 9, sample 0, got a rollout that",
    ),
    "prompt": (lambda r: [of_another(r, prompt_ids=[1])], "another request than the one"),
    "teacher": (lambda r: [of_another(r, teacher_prompt_ids=[1])], "another request than the one"),
    "empty": (lambda r: [replace(r, completion_ids=[])], "no completion_ids"),
    "short": (lambda r: [replace(r, sampling_log_probs=[-1.0])], "1 sampling_log_probs"),
    "mask": (lambda r: [replace(r, completion_mask=[True])], "a completion_mask of 1"),
    "id": (
        lambda r: [replace(r, completion_ids=[103] * len(r.completion_ids))],
        "token id 103, outside the vocabulary of 103",
    ),
    "nan": (
        lambda r: [replace(r, sampling_log_probs=[float("nan")] * len(r.completion_ids))],
        "a sampling log-prob that is not finite",
    ),
    "long": (
        lambda r: [replace(r, completion_ids=[5] * 300, sampling_log_probs=[-1.0] * 300)],
        "300 tokens, more than the student's context of 256 holds",
    ),
}


class Broken(Copied):
    change: Change

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        for rollout in super().generate(requests, sampling):
            yield from Broken.change(rollout)


@pytest.mark.parametrize("name", BROKEN)
def test_what_an_engine_yields_is_checked(
    recipe: MAKES, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = BROKEN[name]
    monkeypatch.setattr(Broken, "change", staticmethod(change), raising=False)
    trainer = Trainer(recipe(**{"rollout.engine": f"{__name__}:Broken"}), progress=False)
    with pytest.raises(RunError, match=re.escape(message)) as raised:
        trainer.step(0)
    assert f"rollout.engine {__name__}:Broken: expected one whole rollout" in str(raised.value)


def test_an_engine_may_not_know_its_log_probs(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Broken,
        "change",
        staticmethod(lambda r: [replace(r, sampling_log_probs=[])]),
        raising=False,
    )
    engine = {"rollout.engine": f"{__name__}:Broken"}
    row = Trainer(recipe(**engine), progress=False).step(0)
    assert row["num_tokens"] > 0
    assert "sampler/mean_abs_difference" not in row
    corrected = recipe(**engine, **{"rollout.correction": "truncated"})
    with pytest.raises(UsageError, match="the engine gave none with its completions"):
        Trainer(corrected, progress=False).step(0)


def not_an_engine(student: Any, config: Config, tokenizer: Any) -> object:
    return object()


def test_engines_that_cannot_be_had_are_refused(recipe: MAKES) -> None:
    for engine, message in (
        ("vlm", r"rollout.engine: expected one of transformers, vllm, vllm_server, package.module"),
        ("no_such_module:f", "rollout.engine: cannot import no_such_module:f"),
        (f"{__name__}:nothing", "has no 'nothing'"),
        (f"{__name__}:not_an_engine", "to return an object with concurrent, generate and sync"),
    ):
        with pytest.raises(UsageError, match=message):
            Trainer(recipe(**{"rollout.engine": engine}), progress=False)


# Task rewards.


def mentions_7(row: Mapping[str, Any], completion: str) -> float:
    assert set(row) >= {"problem"}
    return float("7" in completion)


def undefined(row: Mapping[str, Any], completion: str) -> float:
    return float("nan")


def task_reward(name: str, **options: Any) -> dict[str, Any]:
    return {"rollout.task_reward": {"name": name, "weight": 0.5, **options}}


def test_a_task_reward_is_added_with_its_weight_to_each_completion(recipe: MAKES) -> None:
    name = f"{__name__}:mentions_7"
    trainer = Trainer(recipe(**task_reward(name), **{"train.prompts_per_step": 64}), progress=False)
    rollouts = list(trainer.sample(0))
    examples = trainer.scored(rollouts)
    texts = [
        trainer.inputs.tokenizer.decode(e.rollout.completion_ids, skip_special_tokens=True)
        for e in examples
    ]
    expected = [0.5 * ("7" in text) for text in texts]
    assert [e.task_reward for e in examples] == expected
    assert len(set(expected)) == 2
    all_texts = trainer.inputs.tokenizer.batch_decode(
        [r.completion_ids for r in rollouts], skip_special_tokens=True
    )
    mean = sum(("7" in text) for text in all_texts) / len(all_texts)
    assert trainer.step(0)["task_reward/mean"] == pytest.approx(mean)


def test_the_grader_is_a_task_reward(recipe: MAKES) -> None:
    config = recipe(
        **task_reward("grader"), **{"data.prompts": "embedded:train", "train.prompts_per_step": 2}
    )
    trainer = Trainer(config, progress=False)
    prompts = trainer.prompts(0)
    right = trainer.inputs.tokenizer(f"\\boxed{{{prompts[0].row['answer']}}}")["input_ids"]
    rollouts = [
        replace(r, completion_ids=right, sampling_log_probs=[-1.0] * len(right), stopped=False)
        for r in trainer.sample(0)
    ]
    scored = trainer.scored(rollouts)
    bonus = {e.rollout.request.prompt_index: e.task_reward for e in scored}
    same = prompts[0].row["answer"] == prompts[1].row["answer"]
    assert bonus == {0: 0.5, 1: 0.5 * same}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("2 + 2 = <<2+2=4>>4\n#### 4", "4"), (4, "4"), ([4, -4], "-4, 4"), (r"So $\boxed{4}$.", "4")],
)
def test_golds_of_every_writing_reward_right_answers(
    answer: object, right: str, recipe: MAKES, tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"problem": "2 + 2?", "answer": answer}) + "\n")
    options = {"data.prompts": str(path), "train.prompts_per_step": 1}
    trainer = Trainer(recipe(**task_reward("grader"), **options), progress=False)
    ids = trainer.inputs.tokenizer(f"\\boxed{{{right}}}")["input_ids"]
    rollouts = [
        replace(r, completion_ids=ids, sampling_log_probs=[-1.0] * len(ids), stopped=False)
        for r in trainer.sample(0)
    ]
    assert {e.task_reward for e in trainer.scored(rollouts)} == {0.5}


@pytest.mark.parametrize("answer", [None, "", True, {"a": 1}, [], "Work.\n####"])
def test_golds_that_state_nothing_are_refused(
    answer: object, recipe: MAKES, tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"problem": "2 + 2?", "answer": answer}) + "\n")
    with pytest.raises(UsageError, match=r"answer_column: .* 'answer' of row 0, .* got ") as caught:
        Trainer(recipe(**task_reward("grader"), **{"data.prompts": str(path)}), progress=False)
    assert "\n" not in str(caught.value)


def test_task_rewards_that_cannot_be_had_are_refused(recipe: MAKES) -> None:
    with pytest.raises(UsageError, match=r"rollout.task_reward.name: expected one of math, .*pack"):
        recipe(**task_reward("judge"))
    with pytest.raises(UsageError, match="answer_column: expected text in column 'solution' of"):
        Trainer(recipe(**task_reward("grader", answer_column="solution")), progress=False)
    with pytest.raises(UsageError, match=r"rollout.task_reward.name: .* has no 'nothing'"):
        Trainer(recipe(**task_reward(f"{__name__}:nothing")), progress=False)
    trainer = Trainer(recipe(**task_reward(f"{__name__}:undefined")), progress=False)
    with pytest.raises(RunError, match="undefined: expected a finite number, got nan"):
        trainer.step(0)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_a_missing_vllm_is_named_with_its_extra(recipe: MAKES) -> None:
    with pytest.raises(UsageError, match=r"vllm needs vLLM: pip install 'poweropd\[vllm\]'"):
        Trainer(recipe(**{"rollout.engine": "vllm"}), progress=False)


# The table of engines.


@pytest.mark.parametrize("name", ENGINES)
def test_the_table_says_what_the_engines_say(name: str) -> None:
    engine = import_object(name, ENGINES[name].engine)
    assert ENGINES[name].concurrent == engine.concurrent
    assert callable(engine.build)


def test_an_engine_of_ones_own_that_cannot_sample_beside_an_update_cannot_be_ahead(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Copied, "concurrent", False)
    with pytest.raises(UsageError, match=r"rollout.staleness: 1 needs an engine that samples"):
        Trainer(recipe(**AHEAD), progress=False)
