"""Runs that are killed, run out of disk, or find their directory damaged: exact, or one line."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import SERVER, assert_same_end, run_command, start, write_recipe

from poweropd import Config, Trainer
from poweropd.errors import RunError, UsageError, one_line
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import locked, write_atomically
from poweropd.training import checkpoint, export

MAKES = Callable[..., Config]
KILLS = int(os.environ.get("POWEROPD_KILLS", "4"))  # more of them by hand
SIZES = [int(n) for n in os.environ.get("POWEROPD_SIZES", "2000,20000").split(",")]  # bytes


@pytest.fixture
def whole(recipe: MAKES, tmp_path: Path) -> Path:
    """An undisturbed run of three steps."""
    config = recipe(**{"run.dir": str(tmp_path / "whole")})
    return Trainer(config, progress=False).train().run_dir


def finish(path: Path, errors: Path) -> None:
    process = start(path, errors)
    process.join(120)
    assert process.exitcode == 0, errors.read_text()


def line_of(action: Callable[[], object]) -> str:
    """The line with which an action is refused or fails; empty if it does not."""
    try:
        action()
    except (UsageError, RunError) as error:
        return str(error)
    return ""


# Kills.


@pytest.mark.thorough
def test_kills_in_the_first_second_change_nothing(
    recipe: MAKES, whole: Path, tmp_path: Path
) -> None:
    path, moments = write_recipe(recipe(), tmp_path / "recipe.yaml"), random.Random(1)
    for _ in range(KILLS):
        process = start(path)
        time.sleep(moments.random())
        process.kill()
        process.join()
    finish(path, tmp_path / "errors")
    assert_same_end(whole, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["python"]


@pytest.mark.thorough
def test_kills_in_the_export_change_nothing(recipe: MAKES, whole: Path, tmp_path: Path) -> None:
    path, moments = write_recipe(recipe(), tmp_path / "recipe.yaml"), random.Random(2)
    run = tmp_path / "run"
    for _ in range(KILLS):
        shutil.rmtree(run / "final", ignore_errors=True)
        process = start(path)
        deadline = time.monotonic() + 60
        while not (run / ".tmp-final").exists() and not (run / "final").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.random() * 0.1)
        process.kill()
        process.join()
    finish(path, tmp_path / "errors")
    assert_same_end(whole, run)
    assert not (run / ".tmp-final").exists()


# A full disk.


def run_with_little_room(size: int, recipe: Path, errors: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    run_command(recipe, errors, {})


@pytest.mark.thorough
@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_is_one_line_and_the_run_goes_on_after_it(
    recipe: MAKES, whole: Path, tmp_path: Path, size: int
) -> None:
    path, errors = write_recipe(recipe(), tmp_path / "recipe.yaml"), tmp_path / "errors"
    pipe = tmp_path / "pipe"  # which has no size
    os.mkfifo(pipe)
    process = SERVER.Process(target=run_with_little_room, args=(size, path, pipe))
    process.start()
    said = pipe.read_text()
    process.join(60)
    assert process.exitcode in (1, 2), said
    errors_said = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors_said == said.splitlines()[-1:], said
    assert "Traceback" not in said
    finish(path, errors)
    assert_same_end(whole, tmp_path / "run")


def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(step: int) -> None:
        weights = {"w": torch.full((4,), float(step))}
        checkpoint.save_checkpoint(tmp_path, step, weights, {}, {}, keep=2)

    save(1)

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"step-2: cannot write the checkpoint .* free some space"):
        save(2)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found[2]["step"] == 1


# Damaged directories.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xff[1, {")


def remove(path: Path) -> None:
    path.unlink()


WAYS = (truncate, empty, flip, garbage, remove)
NEWEST = "checkpoints/step-2"
FILES = (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.CHECKSUMS)
#: What is damaged, how, and whether the run must end as an undisturbed one.
DAMAGE: list[tuple[str, Callable[[Path], object], bool]] = [
    *((f"{NEWEST}/{name}", way, True) for name in FILES[:3] for way in WAYS),
    *((f"{NEWEST}/{FILES[3]}", way, way in (empty, remove)) for way in WAYS),
    *(("environment.json", way, way is not flip) for way in WAYS),
    ("metrics.jsonl", empty, False),
    ("metrics.jsonl", garbage, False),
    ("metrics.jsonl", flip, False),
    ("metrics.jsonl", remove, False),
    ("inputs.json", empty, False),
    ("inputs.json", garbage, False),
    ("inputs.json", remove, True),
    ("config.yaml", empty, False),
    ("config.yaml", garbage, False),
    ("config.yaml", remove, False),
]


@pytest.fixture(scope="module")
def half(
    student_dir: Path, teacher_dir: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Config]:
    """Makes a copy of a run that has done two of three steps."""
    home = tmp_path_factory.mktemp("half")

    def config_in(run: Path) -> Config:
        return Config.from_dict(
            {
                "run": {"dir": str(run)},
                "model": {"student": str(student_dir), "dtype": "float32"},
                "teacher": {"model": str(teacher_dir), "dtype": "float32"},
                "data": {"prompts": str(prompts)},
                "rollout": {"max_new_tokens": 12},
                "train": {"steps": 3, "prompts_per_step": 4, "learning_rate": 1e-3},
                "checkpoint": {"every": 1},
            }
        )

    Trainer(config_in(home / "run"), progress=False).train(until=2)

    def copied(run: Path) -> Config:
        config = config_in(run)
        shutil.copytree(home / "run", run)
        (run / "config.yaml").write_text(config.to_yaml())
        return config

    return copied


@pytest.fixture(scope="module")
def undisturbed(half: Callable[[Path], Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = half(tmp_path_factory.mktemp("undisturbed") / "run")
    return Trainer(config, progress=False).train().run_dir


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "way", "exact"), DAMAGE, ids=[f"{way.__name__} {name}" for name, way, _ in DAMAGE]
)
def test_a_damaged_directory_is_resumed_exactly_or_refused_in_one_line(
    half: Callable[[Path], Config],
    undisturbed: Path,
    tmp_path: Path,
    name: str,
    way: Callable[[Path], object],
    exact: bool,
) -> None:
    config = half(tmp_path / "run")
    way(tmp_path / "run" / name)
    line = line_of(lambda: Trainer(config, progress=False).train())
    if line:
        assert not exact, line
        assert str(tmp_path / "run") in line
        assert line == one_line(line)
    else:
        assert_same_end(undisturbed, tmp_path / "run")


def test_leftovers_of_other_runs_and_kills_are_no_checkpoints(
    half: Callable[[Path], Config], undisturbed: Path, tmp_path: Path
) -> None:
    config = half(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-9").mkdir()  # emptied
    (tmp_path / "run" / "checkpoints" / "step-x").mkdir()
    (tmp_path / "run" / "final").mkdir()
    assert not RunDirectory(tmp_path / "run").is_complete
    Trainer(config, progress=False).train()
    assert_same_end(undisturbed, tmp_path / "run")
    assert RunDirectory(tmp_path / "run").is_complete


def test_a_run_whose_checkpoints_are_all_damaged_ends_in_one_line(
    half: Callable[[Path], Config], tmp_path: Path
) -> None:
    config = half(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        flip(path / checkpoint.WEIGHTS)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}
    with pytest.raises(RunError, match="none of its 2 checkpoints is whole"):
        Trainer(config, progress=False)
    assert {p: p.read_bytes() for p in before} == before


def test_checkpoints_are_what_sha256sum_says(
    half: Callable[[Path], Config], tmp_path: Path
) -> None:
    half(tmp_path / "run")
    command = ["sha256sum", "--check", "--strict", checkpoint.CHECKSUMS]
    subprocess.run(command, cwd=tmp_path / "run" / NEWEST, check=True, capture_output=True)


@pytest.mark.parametrize("way", [empty, garbage])
def test_damaged_evaluations_and_best_are_one_line(
    recipe: MAKES, tmp_path: Path, way: Callable[[Path], object]
) -> None:
    evaluate = {"every": 1, "benchmarks": ["embedded"], "limit": 2, "max_new_tokens": 4}
    config = recipe(evaluate=evaluate)
    Trainer(config, progress=False).train(until=1)
    run = tmp_path / "run"
    for name in ("best.json", "eval/step-1/results.json"):
        kept = (run / name).read_bytes()
        way(run / name)
        line = line_of(lambda: Trainer(config, progress=False).train(until=2))
        assert line == one_line(line)
        assert not line or name in line
        (run / name).write_bytes(kept)
    assert Trainer(config, progress=False).train().steps == 3


# One process at a time, with the inputs it began with.


def test_a_directory_is_trained_in_by_one_process(recipe: MAKES, tmp_path: Path) -> None:
    trainer = Trainer(recipe(), progress=False)
    with trainer.run.locked():
        for action in (trainer.train, lambda: Trainer(recipe(), progress=False)):
            with pytest.raises(UsageError, match=r"run.dir: .* is in use by another process"):
                action()
    other = Trainer(recipe(), progress=False)
    other.train(until=2)
    with pytest.raises(UsageError, match=r"holds 2 steps, this process knows of 0: another one"):
        trainer.train()
    assert Trainer(recipe(), progress=False).train().steps == 3


@pytest.mark.parametrize("changed", ["data.prompts", "model.student", "teacher.model"])
def test_inputs_that_change_between_the_parts_of_a_run_are_refused(
    recipe: MAKES, tmp_path: Path, changed: str
) -> None:
    places = {}
    for key, place in recipe().flat().items():
        if key in ("data.prompts", "model.student", "teacher.model"):
            copy = tmp_path / str(key).replace(".", "-")
            copy.parent.mkdir(exist_ok=True)
            if Path(str(place)).is_dir():
                shutil.copytree(str(place), copy)
            else:
                copy = copy.with_suffix(".jsonl")
                shutil.copy(str(place), copy)
            places[str(key)] = copy
    config = recipe(**{key: str(path) for key, path in places.items()})
    Trainer(config, progress=False).train(until=1)
    path = places[changed]
    own = path if path.is_file() else path / "model.safetensors"
    kept = own.read_bytes()
    if path.is_file():
        own.write_text(own.read_text().replace('problem": "', 'problem": "0 + ', 1))
    else:
        flip(own)
    message = rf"{changed} changed since the run began: .* delete .*inputs\.json"
    with pytest.raises(UsageError, match=message):
        Trainer(config, progress=False)
    own.write_bytes(kept)
    os.utime(own)  # another time of the same file is no change
    assert Trainer(config, progress=False).train().steps == 3


def test_a_link_is_not_followed_where_a_file_is_written(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".config.yaml.tmp").symlink_to(precious)
    write_atomically(tmp_path / "config.yaml", "new")
    assert (tmp_path / "config.yaml").read_text() == "new"
    assert precious.read_text() == "mine"
    assert not (tmp_path / "config.yaml").is_symlink()


def test_a_lock_is_held_once_and_ends_with_the_block(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    for _ in range(2):
        with locked(lock, ""), pytest.raises(UsageError, match="taken"), locked(lock, "taken"):
            pass


# Exports.


def test_an_export_that_cannot_be_written_is_found_before_the_first_step(
    recipe: MAKES, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("temperature is not valid\nand more")

    monkeypatch.setattr("transformers.GenerationConfig.save_pretrained", broken)
    with pytest.raises(UsageError, match=r"could be trained, but not saved \(temperature is not"):
        Trainer(recipe(), progress=False)


def test_an_export_that_is_another_model_is_not_kept(
    recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe(), progress=False)
    exported = trainer.student.exported
    monkeypatch.setattr(
        trainer.student, "exported", lambda merge: ((n, t * 1.5) for n, t in exported(merge))
    )
    with pytest.raises(RunError, match=r"final: the exported student gives log-probs that differ"):
        trainer.train()
    assert not (tmp_path / "run" / "final").exists()
    assert Trainer(recipe(), progress=False).train().steps == 3  # from the checkpoint, whole


def test_an_export_that_lacks_weights_is_not_kept(
    recipe: MAKES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe(), progress=False)
    exported = trainer.student.exported
    monkeypatch.setattr(
        trainer.student, "exported", lambda merge: (p for p in exported(merge) if "up_" not in p[0])
    )
    with pytest.raises(RunError, match=r"exported student cannot be loaded again .* files lack"):
        trainer.train()
    assert not (tmp_path / "run" / "final").exists()


def test_the_probe_of_an_export_spans_the_vocabulary(recipe: MAKES) -> None:
    student = Trainer(recipe(), progress=False).student
    last = student.vocab_size - 1
    for masked, expected in ((), last), ((last,), last - 1):
        student.masked_ids = masked
        probe = export.make_probe([1] * 100, student)
        assert probe.num_tokens == export.PROBE_TOKENS
        assert probe.student_targets.max() == expected
    assert len(probe.prompt.prompt_ids) == export.PROBE_TOKENS
