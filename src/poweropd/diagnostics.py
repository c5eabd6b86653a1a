"""How much of a reward's gradient is signal: signal-to-noise ratio, cosine to the exact one.

Gradient norms of different rewards differ in units and prove little. What an optimizer such as
AdamW, which ignores scale, feels is the noise relative to the mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from poweropd.batching import Batch
from poweropd.kernels import Head
from poweropd.models import Student
from poweropd.objectives import Maker, Objective, maker
from poweropd.rewards import Reward


def gradients(
    student: Student, batches: Sequence[Batch], make_objective: Maker, reward: Reward
) -> Tensor:
    """[K, P] gradient of each of K batches, which hold what the objective reads: the teacher's
    log-probs or hidden states. For small models, since all are kept."""
    found = []
    for batch in batches:
        num_tokens = make_objective.num_tokens(batch.rows.bincount().tolist())
        found.append(flat_gradient(student, batch, make_objective(reward, 1 / num_tokens)))
    return torch.stack(found)


def exact_gradient(
    student: Student, teacher_head: Head, batches: Sequence[Batch], reward: Reward
) -> Tensor:
    """[P] mean gradient over batches that hold the teacher's hidden states, exact in the next
    token: what is left of the noise is that of contexts."""
    return gradients(student, batches, maker("full_vocab", teacher_head), reward).mean(0)


def mean_cosine(gradients: Tensor, direction: Tensor) -> float:
    """Mean cosine of [K, P] gradients to a [P] direction."""
    return torch.cosine_similarity(gradients, direction[None]).mean().item()


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
