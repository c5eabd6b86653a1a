"""The run directory's files and the registry of metrics."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from poweropd import Config, Trainer
from poweropd.errors import RunError
from poweropd.report.runs import RecordedRun
from poweropd.runs.directory import RunDirectory
from poweropd.runs.metrics import END_MEAN, MEDIAN, OF_BENCHMARKS, OF_STEPS, TOTAL, Metric, tracked
from poweropd.training import trackers
from poweropd.training.accounting import Utilization

MAKES = Callable[..., Config]


def registered(key: str) -> list[Metric]:
    return [m for m in (*OF_STEPS, *OF_BENCHMARKS.values()) if fnmatchcase(key, m.key)]


# What this recipe's run has no use for: its engine samples from the student itself, and it has no
# tools, schedules, completions of a file, other teachers, teacher's top k, selection or feedback.
OF_OTHER_RECIPES = {
    *("sampler/mean_abs_difference", "sampler/effective_sample_size"),
    *("completions/mean_turns", "completions/mean_tool_calls", "completions/tool_error_fraction"),
    *("rollout/max_new_tokens", "rollout/temperature"),
    *("off_policy/share", "off_policy/mean_weight"),
    *("teacher/*/tokens", "teacher/*/reward", "teacher/*/reverse_kl", "teacher/*/share"),
    *("tail/student", "tail/teacher", "select/fraction"),
    *("feedback/mean_grade", "feedback/left_out_fraction"),
}


def test_every_number_that_a_run_writes_is_in_the_registry(
    recipe: MAKES, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Utilization.of  # this machine's peak is not known, and mfu would be absent
    monkeypatch.setattr(Utilization, "of", lambda *models: known(*models, peak=1e12))
    own = prompts.with_name("own.jsonl")
    own.write_text('{"problem": "1+2", "answer": "3"}\n' * 4)
    config = recipe(
        evaluate={"every": 1, "benchmarks": ["embedded"], "limit": 2, "max_new_tokens": 8},
        **{
            "train.steps": 1,
            "data.prompts": str(own),
            "rollout.correction": "truncated",
            "rollout.task_reward": {"name": "grader"},
        },
    )
    (row,) = RunDirectory(Trainer(config, progress=False).train().run_dir).metrics()
    assert {"mfu", "task_reward/mean", "seconds/record", "eval/embedded/avg_at_k"} <= set(row)
    unknown = {key for key in row if not registered(key)}
    assert unknown == set()
    unused = {m.key for m in OF_STEPS} - {m.key for key in row for m in registered(key)}
    assert unused <= OF_OTHER_RECIPES
    assert tracked({"step": 1, "loss": 0.5, "entropy": None}) == {"loss": 0.5}


def test_registered_keys_are_unique() -> None:
    keys = [m.key for m in OF_STEPS]
    assert len(set(keys)) == len(keys)
    columns = [m.column for m in OF_STEPS if m.sweep]
    assert columns == ["reverse_kl", "grad_norm", "length", "truncated", "seconds"]


def test_the_end_of_a_run_is_its_last_tenth_of_steps() -> None:
    rows = [{"step": s, "x": float(s)} for s in range(1, 21)]
    rows[-1]["x"] = None
    assert END_MEAN.of(rows, "x") == 19.0
    assert END_MEAN.of(rows[-1:], "x") is None
    assert MEDIAN.of(rows, "x") == 10.0
    assert TOTAL.of(rows, "step") == 210
    assert TOTAL.of([], "step") is None


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert (run.metrics(), run.steps_done(), run.best()) == ([], 0, None)
    assert (run.evaluations(), run.gradients(), run.quantization()) == ({}, {}, {})
    for step in (1, 2):
        run.append_metrics({"step": step, "loss": 0.5})
        run.write_evaluation(5 * step, {"b": {"k": step}, "a": {"k": 0}})
    assert run.steps_done() == 2
    assert run.evaluation(10) == run.evaluations()[10] == {"b": {"k": 2}, "a": {"k": 0}}
    assert list(run.evaluations()) == [5, 10]
    run.truncate_metrics(1)
    assert run.metrics() == [{"step": 1, "loss": 0.5}]
    run.write_best("avg_at_k", 0.5, 5)
    found = run.best()
    assert found is not None
    assert (found.metric, found.value, found.step) == ("avg_at_k", 0.5, 5)
    run.write_gradients("start", {"gradient_snr": 1.0})
    run.write_gradients("end", {"gradient_snr": 2.0})
    assert run.gradients() == {"start": {"gradient_snr": 1.0}, "end": {"gradient_snr": 2.0}}
    run.write_quantization({"num_tokens": 3}, "math/hard")
    assert run.quantization("math/hard") == {"num_tokens": 3}
    assert (tmp_path / "quantization-math-hard.json").exists()


def test_damage_is_an_error_or_with_notes_left_out_and_named(tmp_path: Path) -> None:
    run, notes = RunDirectory(tmp_path), list[str]()
    run.append_metrics({"step": 1})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2\n{"step": 3}\n{"step": 4')
    (tmp_path / "best.json").write_text("[1")
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: damaged"):
        run.metrics()
    with pytest.raises(RunError, match=r"best\.json: cannot be read"):
        run.best()
    tolerant = RunDirectory(tmp_path, notes)
    assert [row["step"] for row in tolerant.metrics()] == [1, 3]
    assert tolerant.best() is None
    assert notes == [
        "metrics.jsonl: 2 lines cut short or damaged, left out",
        "best.json: cannot be read (JSONDecodeError)",
    ]


def test_a_line_cut_short_by_a_kill_is_no_error(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append_metrics({"step": 1})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]
    assert run.steps_done() == 1


def test_a_recorded_run_needs_only_its_recipe(recipe: MAKES, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.config_path.write_text(recipe().to_yaml())
    found = RecordedRun("name", run.path)
    assert (found.steps, found.status, found.environment) == (0, "no step finished", {})
    assert len(found.notes) == 2


def test_the_table_of_trackers_names_those_of_the_recipe(recipe: MAKES) -> None:
    names = list(trackers.TRACKERS)
    assert recipe(**{"log.trackers": names}).log.trackers == names
    assert names[0] == "tensorboard"
