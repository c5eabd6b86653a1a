"""lm-eval as a library: its figures in our table and JSON, and what cannot be run, in one line."""

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from poweropd import commands
from poweropd.embedded import task

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (extra harness)"
)
# lm-eval and the packages that it brings warn of what is theirs to change.
pytestmark = pytest.mark.filterwarnings("ignore")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{problem}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|im_end|>"], max_gen_toks: 40, do_sample: false}}
filter_list:
  - name: boxed
    filter:
      - {{function: regex, regex_pattern: "boxed.(-?[0-9]+)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
{more}
"""


def run_eval(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["poweropd", "eval", *arguments])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    return int(stopped.value.code or 0)


def write_task(folder: Path, name: str, file: Path, more: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file, more=more))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of sums, one without its data, and one that runs code."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")  # restored, whatever the command sets
    file, folder = tmp_path / "sums.jsonl", tmp_path / "tasks"
    rows = [{"problem": t.problem, "answer": t.answer} for t in task.problems("evaluation", 24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(folder, "own_sums", file)
    write_task(folder, "own_missing", tmp_path / "none.jsonl")
    write_task(folder, "own_unsafe", file, "unsafe_code: true")
    return folder


@needs_harness
def test_figures_have_standard_errors_in_the_table_and_the_file(
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = tmp_path / "figures.json"
    options = ["--harness", "own_sums", "--harness-tasks", str(tasks), "--limit", "20"]
    options += ["--dtype", "float32", "--json", str(figures)]
    assert run_eval(["embedded:teacher", *options], monkeypatch) == 0
    found = json.loads(figures.read_text())["harness"]
    assert found["settings"]["chat_template"] is True
    assert found["tasks"]["own_sums"]["samples"] == 20
    metric = found["tasks"]["own_sums"]["metrics"]["exact_match,boxed"]
    value = metric["value"]
    assert value > 0.5  # the teacher reads the chat template, and answers as it was taught
    assert metric["stderr"] == pytest.approx(math.sqrt(value * (1 - value) / 19))
    shown = capsys.readouterr().out
    assert "exact_match,boxed" in shown
    assert f"{value:.4f}" in shown


@needs_harness
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("own_sum", "lm-eval has no task 'own_sum' (perhaps own_sums"),
        ("own_sums,own_missing", "--harness own_missing: the task or its data cannot be loaded"),
        ("ifeval", "--harness ifeval: the task or its data cannot be loaded, which may need the n"),
        ("own_unsafe", "--harness own_unsafe: it runs code that the model writes on this machine"),
    ],
)
def test_what_cannot_be_run_is_said_before_the_model_is_loaded(
    names: str,
    message: str,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--harness", names, "--harness-tasks", str(tasks)]
    assert run_eval(["no/such-model", *options], monkeypatch) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@needs_harness
def test_code_runs_with_consent(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--harness", "own_unsafe", "--harness-tasks", str(tasks), "--limit", "2"]
    options += ["--dtype", "float32", "--confirm-run-unsafe-code"]
    assert run_eval(["embedded:student", *options], monkeypatch) == 0
    assert "own_unsafe" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is here")
def test_a_missing_lm_eval_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_eval(["embedded:student", "--harness", "ifeval"], monkeypatch) == 2
    assert "--harness needs lm-eval: pip install 'poweropd[harness]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--harness", "ifeval"],
        ["embedded:student", "--harness", "ifeval", "--benchmark", "embedded"],
        ["embedded:student", "--harness", " , "],
        ["embedded:student", "--harness-tasks", "."],
    ],
)
def test_harness_takes_a_model_and_tasks_alone(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_eval(arguments, monkeypatch) == 2
    assert "error: --harness: expected" in capsys.readouterr().err
