"""Heals a pruned model with its unpruned self as teacher, and compares rewards at their best rates.

    python benchmarks/heal.py --teacher DIR --prompts FILE.jsonl --drop 6 [--out runs/heal]

The student is the teacher without the layers whose removal changes its output least. Every reward is
trained from this start at each learning rate; the rate with the lowest reverse KL on the validation
prompts is trained with the other seeds, too, and all are judged on the test prompts. Runs and
judgements that are complete are not repeated, so a stopped command goes on. `--only pair`, `train`
or `judge` does one part; results.json holds every figure.
"""

import argparse
import itertools
import json
import logging
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from poweropd import Config, Trainer
from poweropd.data.prompts import read_rows
from poweropd.runs.files import write_json

SETTINGS: dict[str, dict[str, Any]] = {
    "log ratio": {"reward": {"name": "log_ratio"}},
    "clip": {"reward": {"name": "clip"}},
    "power 0.5": {"reward": {"name": "power", "alpha": 0.5}},
    "power 1": {"reward": {"name": "power", "alpha": 1.0}},
    "power 5": {"reward": {"name": "power", "alpha": 5.0}},
    "full vocabulary": {
        "reward": {"name": "log_ratio"},
        "objective": {"kind": "full_vocab"},
    },
}
VALIDATION, TEST, CALIBRATION = 24, 48, 4  # prompts
CALIBRATION_TOKENS = 48


@dataclass(frozen=True)
class Training:
    """One training of the study."""

    setting: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Returns the name of its run directory."""
        return f"{self.setting.replace(' ', '-')}-{self.rate:g}-seed{self.seed}"


# The pair


def make_pair(arguments: argparse.Namespace) -> Path:
    """Writes the student and the files of prompts, once; returns the student's directory."""
    out: Path = arguments.out
    student = out / "student"
    if (student / "pair.json").exists():
        return student
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"problem": row[arguments.column]} for row in shuffled(arguments)]
    parts = {"test": rows[:TEST], "validation": rows[TEST : TEST + VALIDATION]}
    parts["train"] = rows[TEST + VALIDATION :]
    for part, own in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in own)
        (out / f"{part}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    model = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32).eval()
    texts = [row["problem"] for row in parts["train"][:CALIBRATION]]
    changes = removal_costs(model, [completed(model, tokenizer, text) for text in texts])
    dropped = sorted(sorted(range(len(changes)), key=changes.__getitem__)[: arguments.drop])
    prune(model, dropped)
    shutil.rmtree(student, ignore_errors=True)
    model.save_pretrained(student)
    tokenizer.save_pretrained(student)
    write_json(student / "pair.json", {"dropped": dropped, "removal_costs": changes})
    print(f"layers left out: {dropped} of {len(changes)}", flush=True)
    return student


def shuffled(arguments: argparse.Namespace) -> list[Any]:
    """Returns the rows of the prompts' file in an order of their own."""
    rows = read_rows(str(arguments.prompts), [arguments.column])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in order.tolist()]


@torch.no_grad()
def completed(model: Any, tokenizer: Any, text: str) -> tuple[Tensor, int]:
    """Returns the ids [1, T] of a prompt with the model's own completion, and its first position."""
    turns = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    ids = model.generate(
        **prompt, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=CALIBRATION_TOKENS
    )
    return ids, prompt["input_ids"].shape[1]


@torch.no_grad()
def removal_costs(model: Any, sequences: Sequence[tuple[Tensor, int]]) -> list[float]:
    """Returns for each layer the forward KL, nats per token, of the model without this layer."""
    whole = [log_probs(model, ids, start) for ids, start in sequences]
    layers = model.model.layers
    costs = []
    for left_out in range(len(layers)):
        model.model.layers = nn.ModuleList(l for i, l in enumerate(layers) if i != left_out)
        kls = [
            (p.exp() * (p - log_probs(model, ids, start))).sum(-1)
            for p, (ids, start) in zip(whole, sequences, strict=True)
        ]
        costs.append(torch.cat(kls).mean().item())
    model.model.layers = layers
    return costs


def log_probs(model: Any, ids: Tensor, start: int) -> Tensor:
    """Returns the log-probs [T - start, V] of the tokens from position `start` on."""
    logits = model(ids, use_cache=False).logits[0, start - 1 : -1]
    return logits.float().log_softmax(-1)


def prune(model: Any, dropped: Sequence[int]) -> None:
    """Takes layers out of a model and of its config."""
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in dropped]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


# Trainings


def train(arguments: argparse.Namespace, student: Path, training: Training) -> Path:
    """Does one training, or the rest of it; returns the directory of the trained student."""
    recipe: dict[str, Any] = {
        "run": {"dir": str(arguments.out / "runs" / training.name)},
        "model": {"student": str(student), "dtype": "float32"},
        "teacher": {"model": str(arguments.teacher), "dtype": "float32"},
        "data": {"prompts": str(arguments.out / "train.jsonl"), "column": "problem", "chat": {}},
        "rollout": {"max_new_tokens": arguments.max_new_tokens},
        "train": {
            "steps": arguments.steps,
            "prompts_per_step": arguments.prompts_per_step,
            "learning_rate": training.rate,
            "schedule": "cosine",
            "warmup_steps": 2,
            "seed": training.seed,
        },
        "checkpoint": {"every": 8, "keep": 1},
    }
    result = Trainer(Config.from_dict(recipe | SETTINGS[training.setting]), progress=False).train()
    if result.final is None:
        raise SystemExit(f"{training.name}: stopped after step {result.steps}")
    # Checkpoints are as large as the model three times; a complete run needs none.
    shutil.rmtree(result.run_dir / "checkpoints", ignore_errors=True)
    return result.final
