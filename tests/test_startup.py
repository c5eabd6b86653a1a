"""What happens before torch is imported: errors that need none come at once, and so does a line."""

import subprocess
import sys
from pathlib import Path

import pytest

from poweropd import __version__

HEAD = "model: {student: embedded:student}\nteacher: {model: embedded:teacher}\n"
RECIPES = {
    "good": HEAD + "data: {prompts: embedded:train}\n",
    "yaml": "model: {student: 3",
    "key": HEAD + "data: {prompts: embedded:train}\nreward: {alpha: -1}\n",
    "student": "model: {student: ./nope}\nteacher: {model: a/b}\ndata: {prompts: a/b}\n",
    "teacher": "model: {student: a/b}\nteacher: {model: runs/x/final}\ndata: {prompts: a/b}\n",
    "prompts": HEAD + "data: {prompts: nope.jsonl}\n",
}
#: Command line -> a part of its one line.
MISTAKES = {
    "train nothere.yaml": "nothere.yaml: no such recipe file",
    "train yaml.yaml": "yaml.yaml: not valid YAML",
    "train key.yaml": "key.yaml:4: reward.alpha: expected a number > 0, got -1",
    "train good.yaml reward.alfa=1": "reward.alfa: unknown parameter of reward power",
    "train student.yaml": "model.student: ./nope: no such model directory",
    "train teacher.yaml": "teacher.model: runs/x/final: no such model directory",
    "train prompts.yaml": "data.prompts: nope.jsonl: no such file or folder",
    "plan nothere.yaml": "nothere.yaml: no such recipe file",
    "plan prompts.yaml": "data.prompts: nope.jsonl: no such file or folder",
    "sweep yaml.yaml": "yaml.yaml: not valid YAML",
    "sweep good.yaml": "an empty sweep",
    "sweep prompts.yaml --over train.seed=1": "data.prompts: nope.jsonl: no such file or folder",
    "tune prompts.yaml": "data.prompts: nope.jsonl: no such file or folder",
    "tune good.yaml --rates 0": "--rates: expected numbers above 0",
    "eval nothere/": "nothere/: no such model directory",
    "eval embedded:student": "--benchmark: expected one or more of gsm8k",
    "eval embedded:student --benchmark nope": "unknown benchmark 'nope'",
    "report nothere": "nothere does not exist",
    "push nothere me/model": "nothere/final: no such directory",
}
HEAVY = ["torch", "transformers", "accelerate", "datasets"]


def run(code: str, cwd: Path) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_errors_that_need_no_torch_come_without_it(tmp_path: Path) -> None:
    """`benchmarks/startup.py` measures the seconds; what they depend on is what is imported."""
    for name, text in RECIPES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    code = f"""
import contextlib, io, sys
from poweropd.commands import main
for line in {list(MISTAKES)}:
    said = io.StringIO()
    sys.argv = ["poweropd", *line.split()]
    try:
        with contextlib.redirect_stderr(said):
            main()
    except SystemExit as end:
        heavy = [name for name in {HEAVY} if name in sys.modules]
        print(end.code, heavy, repr(said.getvalue()))
"""
    found = run(code, tmp_path).splitlines()
    assert len(found) == len(MISTAKES)
    for line, said, message in zip(MISTAKES, found, MISTAKES.values(), strict=True):
        assert said.startswith("2 [] "), (line, said)
        assert message in said, (line, said)
        assert said.count("\\n") == 1, (line, said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_version_and_help_import_next_to_nothing(arguments: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
from poweropd.commands import main
sys.argv = ["poweropd", *{arguments}]
try:
    main()
except SystemExit:
    print([name for name in {[*HEAVY, "pydantic"]} if name in sys.modules])
"""
    said = run(code, tmp_path)
    assert said.endswith("[]\n")
    assert __version__ in said or "train" in said
