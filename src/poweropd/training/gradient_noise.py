"""How much of a reward's gradient is signal: signal-to-noise ratio, cosine to the exact one.

Gradient norms of different rewards differ in units and prove little. What an optimizer such as
AdamW, which ignores scale, feels is the noise relative to the mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from poweropd.data.batch import Batch, collate
from poweropd.data.prompts import PromptOrder
from poweropd.data.rollout import Request
from poweropd.kernels import Head
from poweropd.models.language_model import Student
from poweropd.objectives.base import Objective, TokenRecord
from poweropd.objectives.full_vocab import FullVocab
from poweropd.rewards import Reward
from poweropd.rollouts.base import completion_seed
from poweropd.training.trainer import Trainer
from poweropd.training.update import with_teacher

PROMPTS = 32  # of one batch


def measure_gradient(trainer: Trainer, count: int, cosine: bool = True) -> dict[str, float]:
    """Signal-to-noise ratio of the gradients of `count` fresh batches, by the run's own reward and
    objective and, where wanted, their mean cosine to the exact gradient of that reward."""
    student, teacher = trainer.student, trainer.models.teacher
    batches = fresh_batches(trainer, count)
    if cosine or trainer.config.needs_local_teacher:
        batches = [with_teacher(batch, teacher) for batch in batches]
    reward = _with_statistics(trainer, batches, trainer.reward.at(trainer.steps_done))
    own = gradients(student, batches, trainer.updater.objective, reward)
    found = {"gradient_snr": signal_to_noise(own)}
    if cosine:
        exact = exact_gradient(student, teacher.head(), batches, reward)
        found["gradient_cosine"] = mean_cosine(own, exact)
    return found


@torch.no_grad()
def _with_statistics(trainer: Trainer, batches: Sequence[Batch], reward: Reward) -> Reward:
    """The reward given, where it needs them, its base's mean and population std over batches."""
    if not reward.needs_statistics:
        return reward
    objective, base = trainer.updater.objective, reward.unstandardized
    records = [trainer.student(batch, objective, base, 0.0)[1] for batch in batches]
    rewards = TokenRecord.cat(records).rewards.double()
    return reward.with_statistics(rewards.mean().item(), rewards.std(correction=0).item())


def fresh_batches(trainer: Trainer, batches: int) -> list[Batch]:
    """Scored rollouts of the current student on training prompts; no training step sees them."""
    count = batches * PROMPTS
    seed = trainer.config.train.seed
    prompts = [
        trainer.inputs.prompts[row]
        for row in PromptOrder(len(trainer.inputs.prompts), seed).at_step(0, count)
    ]
    requests = [
        Request(prompt, number, 0, completion_seed(seed, -1, number, 0))
        for number, prompt in enumerate(prompts)
    ]
    examples = trainer.scored(trainer.engine.generate(requests, trainer.sampling))
    groups = [examples[i::batches] for i in range(batches)]
    return [collate(group).to(trainer.accelerator.device) for group in groups]


def gradients(
    student: Student, batches: Sequence[Batch], objective: Objective, reward: Reward
) -> Tensor:
    """Returns the gradients [K, P] of K batches; for small models, since all are kept.

    The batches hold what the objective reads: the teacher's log-probs or hidden states.
    """
    found = []
    for batch in batches:
        num_tokens = objective.num_tokens(batch.completion_index.bincount().tolist())
        found.append(flat_gradient(student, batch, objective, reward, 1 / num_tokens))
    return torch.stack(found)


def exact_gradient(
    student: Student, teacher_head: Head, batches: Sequence[Batch], reward: Reward
) -> Tensor:
    """Returns the mean gradient [P] over batches, exact in the next token.

    The batches hold the teacher's hidden states. The noise that is left is that of the contexts.
    """
    return gradients(student, batches, FullVocab(teacher_head), reward).mean(0)


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


def flat_gradient(
    student: Student, batch: Batch, objective: Objective, reward: Reward, token_weight: float
) -> Tensor:
    """Returns the gradient [P] of one micro-batch's loss in all trained parameters."""
    student.zero_grad()
    loss, _ = student(batch, objective, reward, token_weight)
    loss.backward()
    gradients = [p.grad.flatten() for p in student.trained_weights().values() if p.grad is not None]
    student.zero_grad()
    return torch.cat(gradients)
