"""Whole runs: resume after real kills, signals, two processes, LoRA, the command line."""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import train_on_two_processes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from poweropd import Config, Trainer, commands
from poweropd.errors import UsageError
from poweropd.runs.recorder import RewardRecords

MAKES = Callable[..., Config]
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("poweropd.training.trainer", "poweropd.commands", "poweropd.rollouts.transformers"),
        *("poweropd.objectives.sampled", "poweropd.rollouts.prefetch"),
        *("transformers.models.qwen3.modeling_qwen3", "peft"),
    ]
)
TIMES = ("seconds/", "tokens_per_second", "memory/")


def metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics but for clocks and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def assert_same_end(run: Path, other: Path) -> None:
    assert metrics(run) == metrics(other)
    assert RewardRecords.read(run / "rewards") == RewardRecords.read(other / "rewards")
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def write_recipe(config: Config, path: Path) -> Path:
    path.write_text(config.to_yaml())
    return path


def test_a_run_leaves_a_student_that_anyone_can_load(recipe: MAKES, teacher_dir: Path) -> None:
    config = recipe()
    result = Trainer(config, progress=False).train()
    assert result.steps == 3
    assert result.final is not None
    model = AutoModelForCausalLM.from_pretrained(result.final)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(result.final).chat_template
    rows = metrics(result.run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for key in ("loss", "grad_norm", "reward/p95", "log_ratio/min", "reverse_kl", "entropy"):
        assert all(isinstance(row[key], float) for row in rows)
    assert Config.load(result.run_dir / "config.yaml") == config
    assert json.loads((result.run_dir / "environment.json").read_text())["packages"]["torch"]
    assert len(list((result.run_dir / "checkpoints").iterdir())) == 2


def test_training_brings_the_student_nearer_to_the_teacher(recipe: MAKES) -> None:
    overrides = {"train.steps": 60, "train.prompts_per_step": 16, "reward.name": "log_ratio"}
    Trainer(recipe(**overrides, **{"train.learning_rate": 1e-2}), progress=False).train()
    rows = metrics(Path(recipe().run.dir))
    assert rows[-1]["reverse_kl"] < 0.5 * rows[0]["reverse_kl"]


@pytest.mark.parametrize("kind", ["sampled", "full_vocab"])
def test_a_resumed_run_ends_as_an_undisturbed_one(recipe: MAKES, tmp_path: Path, kind: str) -> None:
    overrides = {"train.steps": 6, "objective.kind": kind, "train.schedule": "cosine"}
    whole = recipe(**overrides)
    Trainer(whole, progress=False).train()
    parts = recipe(**{**overrides, "run.dir": str(tmp_path / "parts")})
    for until in (2, 3, None):
        Trainer(parts, progress=False).train(until=until)
    assert_same_end(Path(whole.run.dir), Path(parts.run.dir))


def test_steps_after_the_last_checkpoint_are_done_again(recipe: MAKES, tmp_path: Path) -> None:
    overrides = {"train.steps": 5, "checkpoint.every": 3}
    whole = recipe(**overrides)
    Trainer(whole, progress=False).train()
    crashed = recipe(**{**overrides, "run.dir": str(tmp_path / "crashed")})
    trainer = Trainer(crashed, progress=False)
    trainer.train(until=3)
    trainer._record(trainer.step(3))  # step 4 is in the metrics, but in no checkpoint
    with trainer.run.metrics_path.open("a") as file:
        file.write('{"step": 5, "lo')  # and a line cut short
    leftover = trainer.run.checkpoints / ".tmp-step-4"
    leftover.mkdir()
    (leftover / "state.json").write_text('{"step": 4}')
    Trainer(crashed, progress=False).train()
    assert_same_end(Path(whole.run.dir), Path(crashed.run.dir))


def start(recipe: Path, errors: Path | None = None, **environment: str) -> "Process":
    """`poweropd train` in a process of its own, forked from a warm server: it starts at once."""
    process = SERVER.Process(target=run_command, args=(recipe, errors, environment))
    process.start()
    return process


def run_command(recipe: Path, errors: Path | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["poweropd", "train", str(recipe)]
    with open(os.devnull, "w") as nowhere, open(errors or os.devnull, "w", buffering=1) as file:
        sys.stdout, sys.stderr = nowhere, file
        commands.main()


@pytest.mark.thorough
def test_kills_at_random_moments_change_nothing(recipe: MAKES, tmp_path: Path) -> None:
    overrides = {"train.steps": 400, "rollout.max_new_tokens": 4, "train.prompts_per_step": 2}
    whole = recipe(**overrides, **{"run.dir": str(tmp_path / "whole")})
    undisturbed = start(write_recipe(whole, tmp_path / "whole.yaml"))
    run = tmp_path / "killed"
    path = write_recipe(recipe(**overrides, **{"run.dir": str(run)}), tmp_path / "killed.yaml")
    moments = random.Random(0)
    for _ in range(20):
        before = last_step(run)
        process = start(path)
        # Wait until it works again, then a random moment more: in a step, a write, a rename.
        while process.is_alive() and last_step(run) <= before:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.1)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 0 < last_step(run) < 400
    last = start(path)
    for process in (undisturbed, last):
        process.join()
        assert process.exitcode == 0
    assert_same_end(tmp_path / "whole", run)


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)]
)
def test_a_signal_finishes_the_step_and_says_how_to_go_on(
    recipe: MAKES, tmp_path: Path, number: signal.Signals
) -> None:
    config = recipe(**{"train.steps": 100_000, "checkpoint.every": 100_000})
    path, errors = write_recipe(config, tmp_path / "long.yaml"), tmp_path / "errors"
    process = start(path, errors)
    run = Path(config.run.dir)
    while last_step(run) < 2 and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    steps = last_step(run)
    assert f"stopped after step {steps}; to go on: poweropd train {path}" in errors.read_text()
    assert (run / "checkpoints" / f"step-{steps}").is_dir()


TWO = {"train.steps": 5, "train.prompts_per_step": 5, "rollout.max_new_tokens": 16}


@pytest.mark.thorough
def test_two_launched_processes_give_the_losses_of_one(recipe: MAKES, tmp_path: Path) -> None:
    path = write_recipe(recipe(**TWO, **{"run.dir": str(tmp_path / "two")}), tmp_path / "two.yaml")
    train_on_two_processes(path)
    Trainer(recipe(**TWO), progress=False).train()
    assert_same_losses(tmp_path / "run", tmp_path / "two")
    for run, processes in (("run", 1), ("two", 2)):
        found = json.loads((tmp_path / run / "environment.json").read_text())
        assert found["processes"] == processes


@pytest.mark.thorough
def test_statistics_and_counts_of_a_step_are_over_all_processes(
    recipe: MAKES, tmp_path: Path
) -> None:
    parts = {"reward.name": "zscore", "objective.baseline": "value"}
    parts |= {"objective.select": {"name": "dial"}, "rollout.correction": "truncated"}
    two = recipe(**TWO, **parts, **{"run.dir": str(tmp_path / "two")})
    path = write_recipe(two, tmp_path / "two.yaml")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    ranks = [start(path, **common, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    Trainer(recipe(**TWO, **parts), progress=False).train()
    assert_same_losses(tmp_path / "run", tmp_path / "two")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def assert_same_losses(one: Path, two: Path) -> None:
    single, double = metrics(one), metrics(two)
    assert len(single) == len(double) == 5
    for mine, theirs in zip(single, double, strict=True):
        assert mine["num_tokens"] == theirs["num_tokens"]
        for key in ("loss", "reward/p95", "entropy", "completions/mean_length"):
            assert mine[key] == pytest.approx(theirs[key], abs=1e-5)
    mine, theirs = (RewardRecords.read(run / "rewards") for run in (one, two))
    keys = ["step", "position", "count", "teacher_count"]
    assert mine.positions.select(keys) == theirs.positions.select(keys)
    assert mine.completions["pieces"] == theirs.completions["pieces"]


def test_lora_trains_the_adapter_alone_and_can_be_merged(
    recipe: MAKES, student_dir: Path, tmp_path: Path
) -> None:
    base = load_file(student_dir / "model.safetensors")
    for merge in (False, True):
        config = recipe(
            **{"run.dir": str(tmp_path / str(merge)), "model.lora": {"r": 2, "merge": merge}}
        )
        final = Trainer(config, progress=False).train().final
        assert final is not None
        if merge:
            merged = weights(tmp_path / "True")
            changed = {name for name in base if not torch.equal(base[name], merged[name])}
            assert changed
            assert all("proj" in name for name in changed)
        else:
            assert (final / "adapter_model.safetensors").exists()


def test_a_bfloat16_run_keeps_float32_weights_while_it_trains(recipe: MAKES) -> None:
    trainer = Trainer(recipe(**{"model.dtype": "bfloat16"}), progress=False)
    assert {p.dtype for p in trainer.student.trained_weights().values()} == {torch.float32}
    assert trainer.engine.model.dtype == torch.bfloat16
    final = trainer.train().final
    assert AutoModelForCausalLM.from_pretrained(final).dtype == torch.bfloat16


def test_another_configuration_is_refused_and_nothing_is_written_over(recipe: MAKES) -> None:
    Trainer(recipe(), progress=False).train()
    run = Path(recipe().run.dir)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=r"holds another configuration \(train.seed: 1 != 42\)"):
        Trainer(recipe(**{"train.seed": 1}), progress=False)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert Trainer(recipe(), progress=False).train().steps == 3  # complete: nothing to do


def test_a_run_goes_on_with_another_token_budget(recipe: MAKES) -> None:
    Trainer(recipe(), progress=False).train(until=2)
    smaller = recipe(**{"train.max_tokens_per_batch": 40, "model.gradient_checkpointing": True})
    trainer = Trainer(smaller, progress=False)
    assert trainer.updater.max_tokens == 40
    assert trainer.train().steps == 3
    assert Config.load(trainer.run.config_path) == smaller


def test_a_directory_with_other_things_in_it_is_refused(recipe: MAKES, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="exists and is not a run directory"):
        Trainer(recipe(), progress=False)


def test_models_that_do_not_fit_are_refused(
    recipe: MAKES, student_rows: Callable[[int], str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no such model directory"):
        Trainer(recipe(**{"model.student": str(tmp_path / "nowhere")}))
    with pytest.raises(UsageError, match=r"student's context of 256 tokens"):
        Trainer(recipe(**{"rollout.max_new_tokens": 1000}))
    # The same tokenizer with padded embeddings is fine, and padding is never sampled or scored.
    trainer = Trainer(recipe(**{"model.student": student_rows(128)}), progress=False)
    assert trainer.student.head().weight.shape[0] == trainer.engine.vocab_size == 103
    assert trainer.train().steps == 3


def test_different_vocabularies_are_refused_with_both_sizes_and_the_ids(
    recipe: MAKES, teacher_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher_dir, other)
    files = json.loads((other / "tokenizer.json").read_text())
    files["model"]["vocab"]["new"] = 103  # not an added token, which may differ
    (other / "tokenizer.json").write_text(json.dumps(files))
    message = (
        r"the student has 103 tokens, the teacher 104; 1 ids differ that are no added tokens: "
        r"103 \(None / 'new'\)"
    )
    with pytest.raises(UsageError, match=message):
        Trainer(recipe(**{"teacher.model": str(other)}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.alpha=0"], "error: override reward.alpha: expected a number > 0, got 0"),
        (["train.steps=0"], "error: override train.steps: expected greater than or equal to 1"),
        (["data.prompts=none.jsonl"], "error: data.prompts: none.jsonl: no such file or folder"),
        (["data.column=question"], "expected text or messages in column 'question'"),
        (["model.student=./nowhere"], "error: model.student: ./nowhere: no such model directory"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    recipe: MAKES,
    tmp_path: Path,
    overrides: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_recipe(recipe(), tmp_path / "recipe.yaml")
    monkeypatch.setattr(sys, "argv", ["poweropd", "train", str(path), *overrides])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_gradient_checkpointing_recomputes_and_changes_nothing(
    recipe: MAKES, tmp_path: Path
) -> None:
    calls = {}
    for on in (False, True):
        config = recipe(**{"run.dir": str(tmp_path / str(on)), "model.gradient_checkpointing": on})
        trainer = Trainer(config, progress=False)
        examples = trainer.scored(trainer.sample(0))
        forwards: list[int] = []
        layer = trainer.student.model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        trainer.updater.update(examples, trainer.reward, 0)
        calls[on] = len(forwards)
        trainer.train()
    assert calls[True] == 2 * calls[False]
    assert_same_end(tmp_path / "False", tmp_path / "True")


def test_the_teacher_may_see_another_prompt(recipe: MAKES, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"problem": "1+2+3", "hint": "The sum of 1, 2 and 3, which is 6"}\n')
    rows = {}
    for column in (None, "hint"):
        config = recipe(
            **{"run.dir": str(tmp_path / str(column)), "data.prompts": str(path)},
            **{"data.teacher_column": column, "train.steps": 1},
        )
        Trainer(config, progress=False).train()
        (rows[column],) = metrics(tmp_path / str(column))
    assert rows[None]["entropy"] == rows["hint"]["entropy"]  # the student saw the same
    assert rows[None]["reverse_kl"] != rows["hint"]["reverse_kl"]


def test_final_stops_where_the_student_was_trained_to(recipe: MAKES) -> None:
    trainer = Trainer(recipe(), progress=False)
    final = trainer.train().final
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.generation_config.eos_token_id == list(trainer.sampling.stop_ids)


def test_a_directory_left_by_a_kill_before_the_first_step_can_be_used(
    recipe: MAKES, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.tmp").write_text("run:")
    Trainer(recipe(**{"train.seed": 1}), progress=False)
    assert Trainer(recipe(), progress=False).train().steps == 3  # nothing had been trained
