"""Tiny models that tests build: random Qwen3s with the embedded pair's tokenizer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from build_embedded import END_OF_TEXT, TURN_END, make_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from poweropd.config import Config
from poweropd.embedded import task

# Tests run side by side, each on a core: so do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def build_model(
    directory: Path, stop: str, hidden_size: int, seed: int, rows: int | None = None, **options: Any
) -> Path:
    tokenizer = make_tokenizer(stop)
    config = Qwen3Config(
        vocab_size=rows or len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=hidden_size // 2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **{
            "num_hidden_layers": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            **options,
        },
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def train_on_two_processes(recipe: Path) -> None:
    """`poweropd train` by torch's launcher, on CPUs; raises if it fails."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, "-m", "poweropd", "train", str(recipe)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        check=True,
        capture_output=True,
    )


def peak_bytes(profile: torch.profiler.profile) -> int:
    """The most that tensors made under `profile_memory` held at once."""
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(sizes))


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "student", END_OF_TEXT, 16, seed=1)


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "teacher", TURN_END, 24, seed=2)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"problem": problem.problem} for problem in task.problems("train", 64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(
    student_dir: Path, teacher_dir: Path, prompts: Path, tmp_path: Path
) -> Callable[..., Config]:
    """Makes a small configuration; overrides are dotted keys, as `recipe(**{"train.steps": 2})`."""

    def make(**overrides: Any) -> Config:
        tree: dict[str, dict[str, Any]] = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"student": str(student_dir), "dtype": "float32"},
            "teacher": {"model": str(teacher_dir), "dtype": "float32"},
            "data": {"prompts": str(prompts)},
            "rollout": {"max_new_tokens": 12},
            "train": {"steps": 3, "prompts_per_step": 4, "learning_rate": 1e-3},
            "checkpoint": {"every": 1},
        }
        for key, value in overrides.items():
            section, _, name = key.partition(".")
            if name:
                tree.setdefault(section, {})[name] = value
            else:
                tree[section] = value
        return Config.from_dict(tree)

    return make


@pytest.fixture(scope="session")
def student_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Makes a student whose embeddings are padded to so many rows."""

    def make(rows: int) -> str:
        directory = tmp_path_factory.mktemp("padded") / str(rows)
        return str(build_model(directory, END_OF_TEXT, 16, seed=3, rows=rows))

    return make
