"""How much of a reward's gradient is signal: signal-to-noise ratio, cosine to the exact one.

Gradient norms of different rewards differ in units and prove little. What an optimizer such as
AdamW, which ignores scale, feels is the noise relative to the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.batching import Batch
from poweropd.kernels import Head
from poweropd.models import Student
from poweropd.objectives import FullVocab, Objective, Sampled
from poweropd.rewards import Reward


@dataclass(frozen=True)
class GradientQuality:
    """`snr`: |mean|^2 / total variance of a batch's gradient, both unbiased. `cosine`: mean cosine
    of a batch's sampled gradient to the exact full-vocabulary gradient of the same reward."""

    snr: float
    cosine: float


def gradient_quality(
    student: Student, teacher_head: Head, batches: Sequence[Batch], reward: Reward
) -> GradientQuality:
    """Measured over K >= 2 batches of fresh rollouts, which hold teacher log-probs and hidden
    states. Keeps 2 K gradients in memory: for small models."""
    sampled, exact = [], []
    for batch in batches:
        weight = 1 / len(batch.positions)
        sampled.append(flat_gradient(student, batch, Sampled(reward, weight)))
        exact.append(flat_gradient(student, batch, FullVocab(reward, weight, teacher_head)))
    mean_exact = torch.stack(exact).mean(0, keepdim=True)
    cosines = torch.cosine_similarity(torch.stack(sampled), mean_exact)
    return GradientQuality(signal_to_noise(torch.stack(sampled)), cosines.mean().item())


def signal_to_noise(gradients: Tensor) -> float:
    """[K, P] gradients of K independent batches -> |E g|^2 / tr Cov g, both estimated unbiased.

    tr Cov = sum_k |g_k - mean|^2 / (K - 1), and |mean|^2 overestimates |E g|^2 by tr Cov / K. So
    pure noise gives about 0, now and then slightly less.
    """
    count = len(gradients)
    mean = gradients.mean(0)
    variance = (gradients - mean).square().sum() / (count - 1)
    return ((mean.square().sum() - variance / count) / variance).item()


def flat_gradient(student: Student, batch: Batch, objective: Objective) -> Tensor:
    """[P] gradient of one micro-batch's loss in all trained parameters."""
    student.zero_grad()
    loss, _ = student(batch, objective)
    loss.backward()
    gradients = [p.grad.flatten() for p in student.trained_weights().values() if p.grad is not None]
    student.zero_grad()
    return torch.cat(gradients)
