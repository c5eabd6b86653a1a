"""Run directories for the tests of reports: two real ones, and one full of markup."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rollout_cases import make_rollout

from poweropd import Config, Trainer
from poweropd.objectives.base import TokenRecord
from poweropd.runs.directory import RunDirectory
from poweropd.runs.recorder import RewardRecorder

INJECTED = (
    "<script>window.injected = 'script'</script><img src=x onerror=\"window.injected = 'img'\">"
)
BENCHMARK = {
    "avg_at_k": {"mean": 0.5, "low": 0.4125, "high": 0.6},
    "mean_length": {"mean": 12.0, "low": 10.0, "high": 14.0},
}


def train(folder: Path, models: Sequence[Path], prompts: Path, reward: str, steps: int) -> Path:
    """A run of tiny models."""
    config = Config.from_dict(
        {
            "run": {"dir": str(folder / reward)},
            "model": {"student": str(models[0]), "dtype": "float32"},
            "teacher": {"model": str(models[1]), "dtype": "float32"},
            "data": {"prompts": str(prompts)},
            "rollout": {"max_new_tokens": 16},
            "reward": {"name": reward},
            "train": {"steps": steps, "prompts_per_step": 4, "learning_rate": 1e-2},
        }
    )
    run = Trainer(config, progress=False).train().run_dir
    for step in (steps // 2, steps):
        RunDirectory(run).write_evaluation(step, {"sums": BENCHMARK})
    return run


def with_markup(source: Path, folder: Path) -> Path:
    """The first steps of a run under a name that is markup, with such completions."""
    run = RunDirectory(folder / '<b onclick="window.injected = 1">bold')
    run.path.mkdir(parents=True)
    for name in ("config.yaml", "environment.json"):
        (run.path / name).write_bytes((source / name).read_bytes())
    lines = RunDirectory(source).metrics_path.read_text().splitlines(keepends=True)
    run.metrics_path.write_text("".join(lines[:4]))
    pieces = [INJECTED, "</script>", "&amp;", "plain"]
    recorder = RewardRecorder(run.rewards, lambda ids: "".join(pieces[i] for i in ids))
    ids = list(range(len(pieces)))
    recorder.record(1, token_record(len(pieces)), [make_rollout(0, ids, ids)])
    recorder.write()
    return run.path


def by_hand(config: Config, steps: int) -> RunDirectory:
    """A run that is going on: metrics and reward records, without any training."""
    run = RunDirectory.open(config)
    recorder = RewardRecorder(run.rewards, lambda ids: "x" * len(ids))
    for step in range(1, steps + 1):
        recorder.record(step, token_record(40, seed=step), [])
        run.append_metrics(metrics(step))
    recorder.write()
    return run


def finish(run: RunDirectory) -> None:
    """Gives a run what makes it complete, as far as a report looks."""
    run.final.mkdir()
    for name in ("config.json", "model.safetensors"):
        (run.final / name).touch()


def metrics(step: int) -> dict[str, float]:
    return {
        "step": step,
        "reverse_kl": 1 / step,
        "grad_norm": float(step),
        "num_tokens": 40,
        "completions/mean_length": 10.0,
        "completions/truncated_fraction": 0.25,
        "seconds/step": 2.0,
        "seconds/rollout": 1.5,
        "memory/peak_bytes": 2**30,
    }


def token_record(n: int, seed: int = 0) -> TokenRecord:
    """One completion of n trained tokens."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (-5 * torch.rand(n, generator=generator) for _ in range(2))
    ones = torch.ones(n)
    return TokenRecord(
        positions=torch.arange(n),
        rewards=teacher - student,
        student_log_probs=student,
        teacher_log_probs=teacher,
        entropy=ones,
        top1=ones,
        teacher_entropy=ones,
        teacher_top1=ones,
        prompt_indices=torch.zeros(n, dtype=torch.long),
        sample_indices=torch.zeros(n, dtype=torch.long),
        sampler_log_ratios=torch.zeros(n),
        weights=torch.ones(n),
        tail=torch.full((n,), torch.nan),
        teacher_tail=torch.full((n,), torch.nan),
        span_sizes=torch.ones(n),
    )


def unknown_teacher(record: TokenRecord) -> TokenRecord:
    """As from a server, which gives log-probabilities alone."""
    nan = torch.full_like(record.teacher_entropy, torch.nan)
    return replace(record, teacher_entropy=nan, teacher_top1=nan)
