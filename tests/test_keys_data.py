"""Keys of the data and of evaluations: what each changes in a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from poweropd import Config, Trainer
from poweropd.errors import UsageError
from poweropd.runs.files import read_jsonl
from poweropd.training.build import RunInputs
from poweropd.training.validation import load_problem_sets

MAKES = Callable[..., Config]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any, Any]]:
    """Name, config, split and revision of each dataset that is asked of the Hub."""
    found: list[tuple[str, Any, Any, Any]] = []

    def load(name: str, config: Any, split: Any, revision: Any) -> datasets.Dataset:
        found.append((name, config, split, revision))
        rows = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(5)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return found


def test_prompts_are_of_the_config_and_revision(
    recipe: MAKES, asked: list[tuple[str, Any, Any, Any]]
) -> None:
    place = {"prompts": "a/sums", "config": "hard", "revision": "v2", "split": "dev"}
    RunInputs.load(recipe(data=place), notify=False)
    assert asked == [("a/sums", "hard", "dev", "v2")]


def test_a_benchmark_is_of_its_revision(
    recipe: MAKES, asked: list[tuple[str, Any, Any, Any]]
) -> None:
    own = {"dataset": "a/sums", "config": "hard", "revision": "v2", "split": "dev"}
    config = recipe(evaluate={"benchmarks": [own]})
    assert config.evaluate is not None
    load_problem_sets(config.evaluate, config)
    assert asked == [("a/sums", "hard", "dev", "v2")]


def test_prompts_that_are_too_long_are_left_out_if_asked_for(recipe: MAKES, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    texts = ["1+1", "+".join("1" * 200), "2+2"]
    path.write_text("".join(json.dumps({"problem": text}) + "\n" for text in texts))
    data = {"prompts": str(path)}
    with pytest.raises(UsageError, match=r"row 1: a prompt of \d+ tokens"):
        RunInputs.load(recipe(data=data), notify=False)
    inputs = RunInputs.load(recipe(data={**data, "filter_longer": True}), notify=False)
    assert [prompt.row["problem"] for prompt in inputs.prompts] == ["1+1", "2+2"]


@pytest.mark.parametrize("before", [True, False])
def test_the_student_is_evaluated_before_the_first_step_if_asked_for(
    recipe: MAKES, before: bool
) -> None:
    section = {"divergence": {"max_new_tokens": 2}, "every": 9, "before": before}
    trainer = Trainer(recipe(**{"evaluate": section, "data.holdout": 4}), progress=False)
    trainer.train(until=1)
    assert (0 in trainer.run.divergences()) is before


def test_completions_of_the_divergence_are_sampled_at_its_temperature(
    recipe: MAKES, tmp_path: Path
) -> None:
    found = {}
    for temperature in (0.0, 1.0):
        section = {"divergence": {"n": 4, "temperature": temperature, "max_new_tokens": 6}}
        keys = {
            "evaluate": section,
            "data.holdout": 2,
            "run.dir": str(tmp_path / f"t-{temperature}"),
        }
        trainer = Trainer(recipe(**keys), progress=False)
        assert trainer.validation is not None
        trainer.validation.evaluate(trainer.subject(), 0, trainer.judges)
        rows = read_jsonl(trainer.run.evaluation_folder(0) / "divergence.jsonl")
        found[temperature] = {(row["id"], row["completion"]) for row in rows}
    assert len(found[0.0]) == 2
    assert len(found[1.0]) > 2
