"""Divergence from the teacher during training: on held-out prompts, and on those of a file."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from teacher_server import NAME, TeacherServer
from test_sharding import on_two_processes, train

from poweropd import Config, Trainer
from poweropd.errors import UsageError
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import read_jsonl

pytestmark = pytest.mark.usefixtures("soon")
MAKES = Callable[..., Config]
HELD_OUT: dict[str, Any] = {"data.holdout": 6, "train.steps": 4}


def divergences(folder: Path) -> dict[int, dict[str, Any]]:
    return RunDirectory(folder).divergences()


@pytest.mark.thorough
def test_held_out_prompts_are_measured_without_being_asked(recipe: MAKES, tmp_path: Path) -> None:
    config = recipe(**HELD_OUT)
    assert (config.evaluate.every, config.evaluate.best) == (1, "reverse_kl")
    trainer = Trainer(config, progress=False)
    trainer.train(until=2)
    taken_up = Trainer(config, progress=False)
    taken_up.train()
    run = taken_up.run
    found = run.divergences()
    assert list(found) == [0, 1, 2, 3, 4]
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    for row in run.metrics():
        assert row["eval/divergence/reverse_kl"] == found[row["step"]]["reverse_kl"]["mean"]
    facts = run.divergence_facts(0)
    assert (facts["estimate"], facts["prompts"], facts["n"]) == ("exact", 6, 1)
    held = {str(prompt.index) for prompt in taken_up.inputs.holdout}
    assert facts["per_prompt"].keys() == held
    best = run.best()
    values = {step: figures["reverse_kl"]["mean"] for step, figures in found.items() if step}
    assert best == ("reverse_kl", min(values.values()), min(values, key=values.__getitem__))
    assert (run.best_student / "model.safetensors").exists()
    # A run in one go ends with the same figures.
    whole = recipe(**HELD_OUT, **{"run.dir": str(tmp_path / "whole")})
    Trainer(whole, progress=False).train()
    assert divergences(tmp_path / "whole") == found


def test_a_file_of_prompts_beside_benchmarks(recipe: MAKES, few: Path, tmp_path: Path) -> None:
    section = {
        **{"every": 2, "benchmarks": ["embedded"], "limit": 2, "max_new_tokens": 4},
        "divergence": {"prompts": str(few), "n": 2, "limit": 3, "max_new_tokens": 5},
    }
    trainer = Trainer(recipe(evaluate=section, **{"train.steps": 2}), progress=False)
    trainer.train()
    facts, row = trainer.run.divergence_facts(2), trainer.run.metrics()[-1]
    assert (facts["prompts"], facts["n"]) == (3, 2)
    assert {"eval/embedded/avg_at_k", "eval/divergence/agreement"} <= row.keys()
    assert trainer.run.best().metric == "avg_at_k"
    rows = read_jsonl(tmp_path / "run" / "eval" / "step-2" / "divergence.jsonl")
    assert max(row["length"] for row in rows) <= 5
    few_lines = few.read_text()
    few.write_text(few_lines.replace("+", "-"))
    try:
        with pytest.raises(UsageError, match=r"evaluate\.divergence\.prompts changed since"):
            Trainer(recipe(evaluate=section, **{"train.steps": 2}), progress=False)
    finally:
        few.write_text(few_lines)


@pytest.mark.thorough
def test_two_processes_give_the_figures_of_one(recipe: MAKES, tmp_path: Path) -> None:
    overrides = {**HELD_OUT, "train.steps": 2, "data.holdout": 5, "train.sharding": "fsdp2"}
    overrides |= {"rollout.max_new_tokens": 8}
    one, two = (recipe(**overrides, **{"run.dir": str(tmp_path / n)}) for n in ("one", "two"))
    Trainer(one, progress=False).train()
    on_two_processes(partial(train, [(two, None)]))
    alone, shared = divergences(tmp_path / "one"), divergences(tmp_path / "two")
    assert alone.keys() == shared.keys() == {0, 1, 2}
    for step, figures in alone.items():
        for name, figure in figures.items():
            assert shared[step][name] == pytest.approx(figure, rel=1e-4, abs=1e-5), name
    assert (tmp_path / "two" / "eval" / "step-1" / "rank-1-of-2" / "divergence.jsonl").exists()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "how", [{"objective.kind": "full_vocab"}, {"teacher.offload": True}, {"model.lora": {"r": 2}}]
)
def test_other_runs_measure_the_same_before_training(
    recipe: MAKES, tmp_path: Path, how: dict[str, Any]
) -> None:
    figures = []
    for name, overrides in (("plain", {}), ("other", how)):
        config = recipe(**HELD_OUT, **overrides, **{"run.dir": str(tmp_path / name)})
        Trainer(config, progress=False).train(until=1)
        figures.append(divergences(tmp_path / name)[0])
    for name, figure in figures[0].items():
        assert figures[1][name] == pytest.approx(figure, rel=1e-5, abs=1e-6)


@pytest.mark.thorough
def test_served_and_several_teachers_in_training(
    recipe: MAKES, server: TeacherServer, teacher_dir: Path, few: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in few.read_text().splitlines()]
    routed = tmp_path / "routed.jsonl"
    lines = [json.dumps({**row, "who": "ab"[i % 2]}) for i, row in enumerate(rows)]
    routed.write_text("\n".join(lines) + "\n")
    here = {"model": str(teacher_dir), "dtype": "float32"}
    there = {"model": NAME, "servers": [server.url], "tokenizer": str(teacher_dir)}
    found = {}
    for name, teacher in {
        "local": here, "served": there, "both": {"by": "who", "a": here, "b": there},
        "two": {"by": "who", "a": here, "b": here},
    }.items():  # fmt: skip
        overrides = {**HELD_OUT, "teacher": teacher, "data.prompts": str(routed)}
        config = recipe(**overrides, **{"run.dir": str(tmp_path / name)})
        Trainer(config, progress=False).train(until=1)
        run = RunDirectory(tmp_path / name)
        found[name] = run.divergence_facts(0)["estimate"], run.divergence(0)
    estimates = {name: estimate for name, (estimate, _) in found.items()}
    assert estimates == {"local": "exact", "served": "sampled", "both": "sampled", "two": "exact"}
    expected = found["local"][1]
    for _, figures in found.values():
        for key in ("agreement", "teacher_log_prob", "mean_length"):
            assert figures[key]["mean"] == pytest.approx(expected[key]["mean"], rel=1e-2)


# Bad input.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"evaluate": {"every": 2}}, "evaluate: expected benchmarks, divergence, or prompts"),
        (
            {"evaluate": {"divergence": {}}},
            r"evaluate\.divergence\.prompts: holdout needs data\.holdout, such as data.holdout=200",
        ),
        (
            {"evaluate": {"divergence": {"n": 0}}, "data.holdout": 4},
            r"evaluate\.divergence\.n: expected greater than or equal to 1",
        ),
        (
            {"evaluate": {"divergence": {}, "best": "f1"}, "data.holdout": 4},
            r"evaluate\.best: expected one of reverse_kl, agreement, .*, got 'f1'",
        ),
        (
            {"evaluate": {"divergence": {"max_new_tokens": 999}}, "data.holdout": 4},
            r"evaluate\.divergence\.prompts row \d+: .*max_new_tokens=999 exceed the student's",
        ),
        (
            {"evaluate": {"divergence": {"prompts": "nowhere.jsonl"}}},
            "nowhere.jsonl: cannot read it",
        ),
    ],
)
def test_mistakes_in_a_recipe(recipe: MAKES, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Trainer(recipe(**overrides), progress=False)


def test_an_estimate_by_a_server_needs_temperature_1(recipe: MAKES, teacher_dir: Path) -> None:
    teacher = {"model": NAME, "servers": ["http://127.0.0.1:1"], "tokenizer": str(teacher_dir)}
    section = {"divergence": {"temperature": 0.5}}
    with pytest.raises(UsageError, match=r"temperature: expected 1 with a served teacher, .* 0.5"):
        recipe(teacher=teacher, evaluate=section, **{"data.holdout": 4})
