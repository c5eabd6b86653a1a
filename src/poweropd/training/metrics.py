"""What a step computes of its completions and tokens, under the keys of `runs.metrics`."""

import math
from collections.abc import Sequence

import torch

from poweropd.objectives.base import TokenRecord
from poweropd.training.update import UpdateOutcome


def completion_metrics(lengths: Sequence[int], stopped: Sequence[bool]) -> dict[str, float]:
    """Returns the metrics of completions of these lengths (tokens) that ended by a stop token."""
    count = len(lengths)
    return {
        "completions/mean_length": sum(lengths) / count,
        "completions/truncated_fraction": sum(not s for s in stopped) / count,
        "completions/stop_fraction": sum(stopped) / count,
    }


def token_metrics(outcome: UpdateOutcome | None) -> dict[str, float | None]:
    """Returns the metrics of a step's trained tokens; None where a number is not finite."""
    if outcome is None:
        return {"num_tokens": 0}
    record = outcome.record
    log_ratio = distribution(record.teacher_log_probs - record.student_log_probs)
    metrics = {
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        **{f"reward/{key}": value for key, value in distribution(record.rewards).items()},
        "reward/zero_fraction": (record.rewards == 0).double().mean().item(),
        **{f"log_ratio/{key}": log_ratio[key] for key in ("mean", "min", "max")},
        "reverse_kl": -log_ratio["mean"],
        "entropy": record.entropy.double().mean().item(),
        "select/fraction": outcome.selected_fraction,
    }
    finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    return {"num_tokens": outcome.num_tokens, **finite}


def sampler_metrics(record: TokenRecord) -> dict[str, float]:
    """Returns how far the sampler is from the student; {} if the engine gave no log-probs.

    The effective sample size, (sum w)^2 / (N sum w^2), is a share of the N tokens.
    """
    known = record.sampler_log_ratios.double()
    known = known[~known.isnan()]
    if not len(known):
        return {}
    weights = record.weights.double()
    size = weights.sum() ** 2 / (len(weights) * weights.square().sum())
    return {
        "sampler/mean_abs_difference": known.abs().mean().item(),
        "sampler/effective_sample_size": size.item(),
    }


def distribution(values: torch.Tensor) -> dict[str, float]:
    """Returns mean, population std, min, max, 5% and 95% quantiles of [N] floats, N >= 1."""
    values = values.double()
    low, high = torch.quantile(values, torch.tensor([0.05, 0.95], dtype=values.dtype)).tolist()
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "min": values.min().item(),
        "max": values.max().item(),
        "p05": low,
        "p95": high,
    }
