"""Hostile input: recipes, overrides, prompt files, answers of servers and other people's runs.

Whatever is given ends well or as one clear line, and no file of the user's changes. `make fuzz`
tries many more examples than the suite does.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poweropd import Config, net
from poweropd.commands import LONGEST_MESSAGE, _say
from poweropd.data.messages import read_conversation, read_tools
from poweropd.data.sources import read_rows
from poweropd.errors import RunError, UsageError, shown
from poweropd.report import page
from poweropd.report.runs import read_runs
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import read_json, read_jsonl

MAKES = Callable[..., Config]
EXAMPLES = int(os.environ.get("POWEROPD_FUZZ", "25"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
RECIPE = "model: {student: a/b}\nteacher: {model: c/d}\ndata: {prompts: p.jsonl}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)
RECIPES = {
    "control": RECIPE + 'run: {dir: "a\\u0001b"}\n',
    "NUL in a name": RECIPE.replace("p.jsonl", '"p\\0.jsonl"'),
    "date": RECIPE + "train: {steps: 2026-13-45}\n",
    "long integer": RECIPE + f"train: {{steps: {'9' * 5000}}}\n",
    "bool": RECIPE + "train: {steps: !!bool maybe}\n",
    "python": RECIPE + "train: !!python/object/apply:os.system [true]\n",
    "deep": "a: " + "[" * 5000 + "]" * 5000,
    "bomb": BOMB,
    "self": "a: &a [*a]\n",
    "reward": RECIPE + "reward: {name: '..:x'}\n",
    "keys": RECIPE + "? [1, 2]\n: 3\n",
    "twice": RECIPE + RECIPE,
    "tabs": "model:\n\tstudent: a\n",
    "long value": RECIPE + f"train: {{schedule: {'x' * 100_000}}}\n",
    "long key": RECIPE + f"{'x' * 100_000}: 1\n",
    "escape": RECIPE + '"\\e[31mred": 1\n',
    "secret": RECIPE + "rollout: {vllm: {hf_token: hf_abcdefghijklmnopqrstuv}}\n",
}


def said(error: BaseException, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that the command line would print."""
    _say(error, 2)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text[:-1].isprintable()
    assert len(text) <= LONGEST_MESSAGE + 10
    return text


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[name])
    start = time.process_time()
    with pytest.raises(UsageError) as caught:
        Config.load(path)
    said(caught.value, capsys)
    assert time.process_time() - start < 5
    assert path.read_text() == RECIPES[name]


def ends_well(work: Callable[[], Any]) -> None:
    """Either a result, or one of the two errors of ours."""
    with suppress(UsageError, RunError):
        work()


keys = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=40)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner)
)
sections = st.sampled_from(["model", "teacher", "data", "rollout", "reward", "train", "evaluate"])


@fuzz
@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_text_as_a_recipe(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    ends_well(lambda: Config.load(path))


@fuzz
@given(st.dictionaries(sections, st.dictionaries(st.text(max_size=12), trees) | trees))
def test_any_tree_as_a_recipe(tree: dict[str, Any]) -> None:
    base = {"model": {"student": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "p"}}
    ends_well(lambda: Config.from_dict({**base, **tree}))


@fuzz
@given(st.lists(st.text(max_size=40) | st.builds("{}.{}={}".format, sections, st.text(max_size=8),
                                                 st.text(max_size=20)), max_size=3))  # fmt: skip
def test_any_override(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    ends_well(lambda: Config.load(path, overrides))


@fuzz
@given(st.binary(max_size=200) | st.lists(trees, max_size=3).map(
    lambda rows: "\n".join(json.dumps(row) for row in rows).encode()), st.sampled_from(
    ["jsonl", "json", "parquet", "csv", "jsonl.gz", "parquet.gz"]))  # fmt: skip
def test_any_bytes_as_prompts(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"prompts.{ending}"
    path.write_bytes(content)
    ends_well(lambda: read_rows(str(path), ["problem"]))
    assert path.read_bytes() == content


messages = st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "type"]),
                           st.sampled_from(["user", "assistant", "system"]) | trees)  # fmt: skip


@fuzz
@given(trees | st.lists(messages | trees, max_size=4))
def test_any_value_as_a_prompt(value: Any) -> None:
    ends_well(lambda: read_conversation({"prompt": value}, "prompt", "here"))
    ends_well(lambda: read_tools({"prompt": value}, "prompt", "here"))


@fuzz
@given(leaves)
def test_a_log_prob_is_a_number_of_at_most_0(value: Any) -> None:
    try:
        found = net.read_log_prob(value)
    except ValueError:
        return
    assert isinstance(value, int | float)
    assert not isinstance(value, bool)
    assert found <= 0
    assert found == -math.inf or abs(found - value) <= 1e-3


@fuzz
@given(keys, st.integers(0, 30), st.integers(6, 40))
def test_no_long_part_of_a_key_is_repeated(key: str, start: int, length: int) -> None:
    part = key[start : start + length]
    hidden = net.masked(f"your key ({part}) is wrong", key)
    assert len(part) < 6 or part not in hidden


names = st.sampled_from(["step", "reward/mean", "grad_norm", "loss"])
metrics = st.lists(st.dictionaries(names, trees | st.integers(10**400, 10**401)), max_size=4)


@settings(fuzz, max_examples=max(5, EXAMPLES // 5))
@given(metrics, trees)
def test_a_report_of_any_metrics_and_results(
    recipe: MAKES, tmp_path: Path, rows: list[dict[str, Any]], results: Any
) -> None:
    run = RunDirectory(tmp_path / "run")
    if not run.config_path.exists():
        RunDirectory.open(recipe(**{"run.dir": str(run.path)}))
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.evaluation_folder(1).mkdir(parents=True, exist_ok=True)
    (run.evaluation_folder(1) / "results.json").write_text(json.dumps({"results": results}))
    found = read_runs([run.path])
    assert page.render(found, *page.sections(found)).startswith("<!doctype html>")


@fuzz
@given(st.binary(max_size=100))
def test_any_bytes_as_a_file_of_a_run(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    notes: list[str] = []
    for read in (read_json, read_jsonl):
        read(path, notes)  # left out with a note
        ends_well(lambda: read(path))  # noqa: B023


def test_reading_a_run_does_not_execute_what_it_names(
    recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    (tmp_path / "theirs.py").write_text("open('executed', 'w').close()\n")
    run = RunDirectory.open(recipe(**{"run.dir": str(tmp_path / "run")}))
    own = {"name": "theirs:reward"}
    text = run.config_path.read_text().replace("name: power", f"name: {own['name']}")
    run.config_path.write_text(text)
    found = read_runs([run.path])
    _, notes = page.sections(found)
    assert any("code of the user's own" in note for note in notes)
    assert RunDirectory(run.path).config().reward.name == own["name"]
    assert not (tmp_path / "executed").exists()
    assert "theirs" not in sys.modules


def test_shown_values_are_short_and_printable() -> None:
    assert shown("a\x1b[31m\n") == "'a\\x1b[31m\\n'"
    assert len(shown("x" * 100_000)) < 120
