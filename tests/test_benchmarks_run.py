"""The benchmarks of the update run, and what they compare computes the same gradient."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from poweropd.config import Config
from poweropd.training.gradient_noise import fresh_batches
from poweropd.training.trainer import Trainer

FULL = ("trl-full", "trl-trainer", "trl-adapter-full")  # paths of the whole vocabulary
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the modules of benchmarks/ importable, for one test."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def update(benchmarks: None) -> ModuleType:
    return importlib.import_module("update")


@pytest.fixture
def scaling(benchmarks: None) -> ModuleType:
    return importlib.import_module("scaling")


def gradient(update: ModuleType, path: str, lengths: str) -> torch.Tensor:
    """What `path` gives to the optimizer, clipped and flat, and that it moves the student."""
    geometry = update.GEOMETRIES["tiny"]
    pair = update.Pair.build(geometry, lengths)
    found = []
    pair.optimizer.register_step_pre_hook(
        lambda *_: found.append(
            torch.cat([p.grad.flatten().clone() for p in pair.student.parameters()])
        )
    )
    before = [p.detach().clone() for p in pair.student.parameters()]
    update.PATHS[path](pair)()
    after = list(pair.student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return found[0]


def test_every_objective_gets_its_cell(benchmarks: None, recipe: Callable[..., Config]) -> None:
    objectives = importlib.import_module("objectives")
    trainer = Trainer(recipe(), progress=False)
    teacher = trainer.models.teacher
    batches = fresh_batches(trainer, 3)
    cells = objectives.cells(trainer.updater, teacher, batches, trainer.reward)
    assert len(cells) == len(objectives.objectives(teacher))
    assert all(re.fullmatch(r"-?\d\.\d\d \(-?[01]\.\d\d\)", cell) for cell in cells)


def needs_trl(path: str) -> object:
    absent = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
    warnings = pytest.mark.filterwarnings("ignore")  # they are of its own packages
    return pytest.param(path, marks=[absent, warnings])


@pytest.mark.parametrize("lengths", ["fixed", "ragged"])
@pytest.mark.parametrize("path", ["naive", needs_trl("trl-logprob"), needs_trl("trl-adapter")])
def test_sampled_paths_have_our_gradient(update: ModuleType, path: str, lengths: str) -> None:
    expected = gradient(update, "ours", lengths)
    torch.testing.assert_close(gradient(update, path, lengths), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("path", [needs_trl(path) for path in FULL])
def test_full_vocabulary_paths_have_our_gradient(update: ModuleType, path: str) -> None:
    expected = gradient(update, "ours-full", "ragged")
    torch.testing.assert_close(gradient(update, path, "ragged"), expected, rtol=1e-3, atol=1e-6)


def test_operations_of_the_paper_s_geometry(update: ModuleType) -> None:
    geometry = update.GEOMETRIES["qwen3-0.6b-from-4b"]
    flops = update.update_flops(geometry, geometry.lengths("fixed"))
    assert flops == pytest.approx(448.5e12, rel=1e-3)


def test_ragged_lengths_have_the_mean(update: ModuleType) -> None:
    lengths = update.GEOMETRIES["small"].lengths("ragged")
    assert sum(lengths) / len(lengths) == pytest.approx(157, rel=0.03)
    assert max(lengths) <= 256


def test_a_path_without_its_package_gives_the_reason(
    update: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl.trainer.distillation_trainer", None)
    found = update.run("trl-full", update.GEOMETRIES["tiny"], "fixed", 1)
    assert found.startswith("TRL >= 1.16 cannot be imported: ")


@pytest.mark.thorough
def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    """In bfloat16 with float32 master weights, as on a GPU."""
    file = tmp_path / "update.json"
    command = [sys.executable, str(BENCHMARKS / "update.py"), "--geometry", "tiny"]
    command += ["--dtype", "bfloat16", "--paths", "ours,ours-full"]
    command += ["--repeats", "1", "--updates", "1", "--json", str(file)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "tiny, bfloat16" in printed
    assert "CPU s" in printed
    paths = json.loads(file.read_text())["paths"]
    assert paths.keys() == {"ours", "ours-full"}
    for found in paths.values():
        assert {"cpu_seconds", "wall_seconds", "peak_bytes"} <= set(found)
        assert found["cpu_seconds"] > 0


def test_an_evaluation_of_canned_completions_grades_them(benchmarks: None, tmp_path: Path) -> None:
    problems = [{"id": str(i), "problem": f"1 + {i} = ?", "answer": str(1 + i)} for i in range(6)]
    (tmp_path / "amc23.jsonl").write_text("\n".join(map(json.dumps, problems)))
    found = importlib.import_module("evaluation").cost_of("amc23", tmp_path)
    assert found["problems"] == 6
    assert found["right"] == found["right ones given"] == 4


@pytest.mark.thorough
@pytest.mark.parametrize("path", ["ours-checkpointed", "naive"])
def test_memory_of_a_long_completion(benchmarks: None, path: str) -> None:
    """In a process of its own, which holds nothing yet."""
    context = importlib.import_module("context")
    geometry = context.long(context.NARROW, vocab=512, tokens=64)
    assert importlib.import_module("common").apart(1, context.peak, path, geometry, 20.0) > 0


def test_what_a_token_takes_is_the_slope_of_a_line(benchmarks: None) -> None:
    slope, start = importlib.import_module("scaling").line_through([1, 2, 4], [30, 50, 90])
    assert (slope, start) == (pytest.approx(20), pytest.approx(10))


@pytest.mark.thorough
@pytest.mark.parametrize("part", ["gradients", "checkpointing", "engine", "chunks"])
def test_each_part_for_a_gpu_has_rows(benchmarks: None, part: str) -> None:
    """At tiny size, on a CPU."""
    gpu = importlib.import_module("gpu")
    rows = list(gpu.PARTS[part].rows(gpu.GEOMETRIES["tiny"]))
    assert len(rows) > 1
    assert all(len(row) > 1 for row in rows)


@pytest.mark.thorough
def test_the_command_for_a_gpu_says_what_it_could_not_measure(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--geometry", "tiny"]
    command += ["--out", str(tmp_path), "--only", "phases,training,update", "--minutes", "3"]
    subprocess.run(command, check=True, capture_output=True)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [*parts] == ["phases", "training", "update"]
    assert all(part["rows"] or part["stopped"] for part in parts.values())
    assert all(row["relative difference"] < 1e-5 for row in parts["training"]["rows"])
    assert "## Where the time goes" in (tmp_path / "gpu.md").read_text()


def test_a_part_that_takes_too_long_is_stopped(benchmarks: None, tmp_path: Path) -> None:
    found = importlib.import_module("gpu").outcome("memory", "tiny", tmp_path, 1.0)
    assert found["stopped"] == "it took more than 1 s"
    assert found["rows"] == []


def test_phases_hold_all_operations_of_an_update(update: ModuleType, scaling: ModuleType) -> None:
    geometry = update.GEOMETRIES["tiny"]
    flops = scaling.phase_flops(geometry)
    assert sum(flops.values()) == update.update_flops(geometry, geometry.lengths("fixed"))
    assert scaling.phase_seconds(geometry, repeats=1).keys() == flops.keys()


@pytest.mark.slow
def test_whole_steps_are_timed_and_a_missing_trainer_is_said(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    command = [sys.executable, str(BENCHMARKS / "step.py"), "--geometry", "tiny", "--steps", "1"]
    command += ["--lengths", "ragged", "--repeats", "1", "--json", str(file)]
    done = subprocess.run(
        [*command, "--paths", "ours,ours-full,naive,trl"],
        capture_output=True,
        text=True,
        check=True,
    )
    costs = json.loads(file.read_text())["costs"]
    assert {"ours", "ours-full", "naive"} <= {*costs}
    assert all(cost["cpu_seconds"] > 0 for own in costs.values() for cost in own)
    assert "CPU / naive" in done.stdout
    assert ("trl" in costs) != ("trl: skipped: TRL >= 1.16 cannot be imported" in done.stdout)


@pytest.mark.thorough
@pytest.mark.parametrize("lengths", ["ragged"])
def test_the_engine_is_compared_with_generate(tmp_path: Path, lengths: str) -> None:
    file = tmp_path / "engine.json"
    command = [sys.executable, str(BENCHMARKS / "engine.py"), "--geometry", "tiny", "--batch", "4"]
    command += ["--lengths", lengths, "--prompts", "10", "--repeats", "1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    costs = json.loads(file.read_text())["per_1000_tokens"]
    assert [*costs] == ["engine", "generate"]
    assert all(cost["cpu_seconds"] > 0 for own in costs.values() for cost in own)
    assert "times generate" in done.stdout


def test_head_costs_show_the_gradient_of_autograd(scaling: ModuleType) -> None:
    rows = scaling.head_costs(scaling.GEOMETRIES["tiny"], repeats=1)
    assert len(rows) == len(scaling.ALPHAS)
    assert all(float(row["error to autograd"]) < 1e-5 for row in rows)


def test_flat_micro_batches_hold_the_tokens_and_no_padding(
    benchmarks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["packing.py", "--geometry", "tiny", "--repeats", "1"])
    importlib.import_module("packing").main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    computed = {row.split()[0]: int(row.split()[3]) for row in rows}
    assert f"{computed['flat']} tokens in 4 rows" in head
    assert computed["padded"] > computed["flat"]
