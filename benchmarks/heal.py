"""Heals a pruned model with its unpruned self as teacher, and compares rewards at their best rates.

    python benchmarks/heal.py --teacher DIR --prompts FILE.jsonl --drop 6 [--out runs/heal]

The student is the teacher without the layers whose removal changes its output least. Every setting
is trained from this start at each learning rate; the rate with the lowest reverse KL on validation
prompts is trained with the other seeds, too, and these are judged on test prompts. What is complete
is not repeated, so a stopped command goes on. results.json holds every figure, healing.png shows
them.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair
import torch
from common import machine, print_table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from poweropd import Config, Trainer
from poweropd.config.data import DataConfig
from poweropd.config.teachers import TeacherConfig
from poweropd.data.sources import read_rows
from poweropd.evaluation.divergence import PromptTotals, paired_differences
from poweropd.evaluation.divergence_command import ModelOptions, measure_divergence
from poweropd.evaluation.metrics import Estimate
from poweropd.evaluation.settings import DivergenceSettings
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import JsonObject, read_json, write_json

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
    """Returns a prompt with the model's own completion, [1, T], and where that begins."""
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
        model.model.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i != left_out)
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
    run = RunDirectory(arguments.out / "runs" / training.name)
    if run.is_complete:
        return run.final
    recipe: dict[str, Any] = {
        "run": {"dir": str(run.path)},
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
    config = Config.from_dict(recipe | SETTINGS[training.setting])
    result = Trainer(config, progress=False).train()
    if result.final is None:
        raise SystemExit(f"{training.name}: stopped after step {result.steps}")
    # Checkpoints are three times as large as the model, and a complete run needs none.
    shutil.rmtree(result.run_dir / "checkpoints", ignore_errors=True)
    return result.final


# Judgements


def judged(arguments: argparse.Namespace, model: Path, part: str, name: str) -> JsonObject:
    """Returns how far a model is from the teacher on a part of the prompts, measured once."""
    path: Path = arguments.out / "judged" / f"{name}-{part}.json"
    if path.exists():
        return read_json(path)
    report = measure_divergence(
        str(model),
        TeacherConfig(model=str(arguments.teacher), dtype="float32"),
        DataConfig(prompts=str(arguments.out / f"{part}.jsonl"), column="problem", chat={}),
        DivergenceSettings(max_new_tokens=arguments.max_new_tokens),
        arguments.out / "judged" / "completions" / f"{name}-{part}",
        ModelOptions("float32", trust_remote_code=False, batch_size=8),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report.to_dict())
    return report.to_dict()


def reverse_kl(found: JsonObject) -> float:
    """Returns the reverse KL of a judgement, in nats per token."""
    return float(found["divergence"]["reverse_kl"]["mean"])


def pooled(judgements: Sequence[JsonObject]) -> dict[str, PromptTotals]:
    """Adds up the sums of each prompt over several trainings."""
    found: dict[str, Any] = {}
    for one in judgements:
        for prompt, own in one["per_prompt"].items():
            into = found.setdefault(prompt, dict.fromkeys(own, 0))
            for key, value in own.items():
                into[key] += value
    return found


# The study


def study(arguments: argparse.Namespace, student: Path) -> JsonObject:
    """Does what is missing of the study, and returns its figures."""
    first, *others = range(1, arguments.seeds + 1)
    start = judged(arguments, student, "test", "start")
    rates: dict[str, dict[str, float]] = {name: {} for name in arguments.settings}
    for rate in arguments.rates:  # the outer loop, so that a stopped study compares settings
        for setting in arguments.settings:
            training = Training(setting, rate, first)
            final = train(arguments, student, training)
            found = judged(arguments, final, "validation", training.name)
            rates[setting][f"{rate:g}"] = reverse_kl(found)
            print(f"{training.name}: validation {reverse_kl(found):.3f} nats", flush=True)
    best = {name: float(min(own, key=own.__getitem__)) for name, own in rates.items()}
    tests: dict[str, list[JsonObject]] = {name: [] for name in arguments.settings}
    for seed in (first, *others):
        for setting, rate in best.items():
            training = Training(setting, rate, seed)
            final = train(arguments, student, training)
            tests[setting].append(judged(arguments, final, "test", training.name))
    return {
        "machine": machine(),
        "steps": arguments.steps,
        "validation_by_rate": rates,
        "best_rate": best,
        "start": start["divergence"],
        "settings": {name: of_setting(own, tests) for name, own in tests.items()},
    }


def of_setting(own: Sequence[JsonObject], tests: dict[str, list[JsonObject]]) -> JsonObject:
    """Returns a setting's figures: by seed, their mean, and the difference from the first one."""
    baseline = next(iter(tests.values()))
    by_seed = [one["divergence"] for one in own]
    means = {
        figure: statistics.fmean(one[figure]["mean"] for one in by_seed) for figure in by_seed[0]
    }
    differences = paired_differences(pooled(own), pooled(baseline))
    return {
        "by_seed": by_seed,
        "mean": means,
        "minus_baseline": {name: vars(value) for name, value in differences.items()},
    }


def show(arguments: argparse.Namespace, found: JsonObject) -> None:
    """Prints the table of the study, and draws it."""
    baseline = arguments.settings[0]
    start = found["start"]
    rows = [["pruned", "", f"{start['reverse_kl']['mean']:.3f}", "", "", ""]]
    for setting, own in found["settings"].items():
        difference = Estimate(**own["minus_baseline"]["reverse_kl"])
        rows.append(
            [
                setting,
                f"{found['best_rate'][setting]:g}",
                f"{own['mean']['reverse_kl']:.3f}",
                " ".join(f"{one['reverse_kl']['mean']:.3f}" for one in own["by_seed"]),
                f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
                f"{own['mean']['agreement']:.3f}",
            ]
        )
    header = ["setting", "rate", "reverse KL", "by seed", f"minus {baseline} [95%]", "same token"]
    print_table(header, rows)
    print(f"{found['steps']} steps, {arguments.seeds} seeds, {found['machine']}")
    draw(found, arguments.out / "healing.png")


def draw(found: JsonObject, path: Path) -> None:
    """Draws the reverse KL by learning rate, and at the best rate by seed."""
    by_rate = [
        {"setting": setting, "rate": float(rate), "kl": value}
        for setting, own in found["validation_by_rate"].items()
        for rate, value in own.items()
    ]
    by_seed = [
        {"setting": setting, "kl": one["reverse_kl"]["mean"]}
        for setting, own in found["settings"].items()
        for one in own["by_seed"]
    ]
    color = altair.Color("setting:N", title=None, sort=list(found["settings"]))
    kl = altair.Y("kl:Q", title="reverse KL, nats per token", scale=altair.Scale(zero=False))
    rate = altair.X("rate:Q", title="learning rate", scale=altair.Scale(type="log"))
    lines = altair.Chart(altair.Data(values=by_rate), title="Validation prompts, first seed")
    dots = altair.Chart(altair.Data(values=by_seed), title="Test prompts, best rate, each seed")
    setting = altair.X("setting:N", title=None, sort=list(found["settings"]))
    chart = lines.mark_line(point=True).encode(rate, kl, color) | dots.mark_point(
        filled=True, size=70
    ).encode(setting, kl, color)
    chart.save(path, scale_factor=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--column", default="problem")
    parser.add_argument("--drop", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/heal"))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--prompts-per-step", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=lambda text: [float(r) for r in text.split(",")],
                        default=[3e-5, 1e-4, 3e-4])  # fmt: skip
    parser.add_argument("--settings", type=lambda text: text.split(","), default=list(SETTINGS))
    parser.add_argument("--pair-only", action="store_true", help="make the pair, train nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    student = make_pair(arguments)
    if arguments.pair_only:
        return
    found = study(arguments, student)
    write_json(arguments.out / "results.json", found)
    show(arguments, found)


if __name__ == "__main__":
    main()
