"""Random tiny Qwen3s that tests build, with the embedded pair's tokenizer."""

import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from build_embedded import make_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM


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
