"""How much of a reward's gradient is signal: signal-to-noise ratio, cosine to the exact one.

Gradient norms of different rewards differ in units and prove little. What an optimizer such as
AdamW, which ignores scale, feels is the noise relative to the mean.

The gradients of a small model are kept as they are. Those of a large one are projected at random
to a vector of fixed size each, which keeps lengths and angles up to a small error, so a model of
any size can be measured that can be trained.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from poweropd.data.prompts import PromptOrder
from poweropd.data.rollout import Example, Request
from poweropd.objectives.full_vocab import FullVocab
from poweropd.rewards import Reward
from poweropd.rollouts.base import completion_seed
from poweropd.training.trainer import Trainer
from poweropd.training.update import Updater

PROMPTS = 32  # of one batch
#: Bytes that all gradients may take before they are projected.
STORED_BYTES = 2**28
BUCKETS, BLOCK = 2**16, 2**20  # numbers of a projected gradient, and numbers projected at once

#: Makes one vector of a gradient, given by parameter: None where a parameter has none.
Flatten = Callable[[Iterable[Tensor | None]], Tensor]


def measure_gradient(trainer: Trainer, count: int, cosine: bool = True) -> dict[str, float]:
    """Measures the gradients of `count` fresh batches, by the run's own reward and objective.

    Returns their signal-to-noise ratio and, if wanted, their mean cosine to the exact gradient of
    that reward, which needs a single teacher in this process.
    """
    updater, reward = trainer.updater, trainer.reward.at(trainer.steps_done)
    batches = fresh_batches(trainer, count)
    if reward.needs_statistics:
        reward = updater.standardized([example for batch in batches for example in batch], reward)
    size = sum(weight.numel() for weight in trainer.student.trained_weights().values())
    flatten = concatenated if 4 * size * count <= STORED_BYTES else projected
    own = gradients(updater, batches, reward, flatten)
    found = {"gradient_snr": signal_to_noise(own)}
    if cosine:
        teacher = trainer.models.teacher
        exact = updater.with_objective(FullVocab(teacher.head()), teacher)
        direction = gradients(exact, batches, reward, flatten).mean(0)
        found["gradient_cosine"] = mean_cosine(own, direction)
    return found


def fresh_batches(trainer: Trainer, batches: int) -> list[list[Example]]:
    """Samples and scores completions of training prompts; no training step sees them."""
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
    sampling = trainer.asked.sampling(trainer.steps_done, trainer.sampling)
    examples = trainer.scored(trainer.engine.generate(requests, sampling))
    return [examples[i::batches] for i in range(batches)]


def gradients(
    updater: Updater, batches: Sequence[Sequence[Example]], reward: Reward, flatten: Flatten
) -> Tensor:
    """Returns the gradients of K batches, [K, n], as vectors that `flatten` makes; float32.

    By an objective over the whole vocabulary they are exact in the next token: the noise that is
    left is that of the contexts.
    """
    found = []
    for batch in batches:
        num_tokens = updater.objective.num_tokens([example.num_tokens for example in batch])
        if num_tokens:
            updater.accumulate_fitting(batch, reward, num_tokens)
            weights = updater.student.parameters()
            found.append(flatten(p.grad for p in weights if p.requires_grad))
            updater.optimizer.zero_grad()
    return torch.stack(found)


def concatenated(gradient: Iterable[Tensor | None]) -> Tensor:
    """Returns a gradient as one vector [P], for small models; parameters without one are left out.

    Which parameters have none is the same for all batches of a small model.
    """
    return torch.cat([part.flatten().float() for part in gradient if part is not None])


def projected(gradient: Iterable[Tensor | None], buckets: int = BUCKETS, seed: int = 0) -> Tensor:
    """Returns a random projection of a gradient, [buckets], the same one at every call.

    Every number goes into a random bucket with a random sign. Inner products of two projections
    are those of the gradients on average, with a standard deviation of about |a| |b| /
    sqrt(buckets) (Charikar et al. 2002, Count sketch; Weinberger et al. 2009). The buckets of a
    block are drawn when it is projected, so nothing larger than a block is held.
    """
    total: Tensor | None = None
    for number, part in enumerate(gradient):
        if part is None:
            continue
        if total is None:
            total = torch.zeros(buckets, device=part.device)
        generator = torch.Generator(part.device).manual_seed(seed + number)
        for block in part.flatten().split(BLOCK):
            drawn = torch.randint(2 * buckets, block.shape, generator=generator, device=part.device)
            signed = torch.where(drawn % 2 == 0, block, -block)
            total.index_add_(0, drawn // 2, signed.float())
    if total is None:
        raise ValueError("expected the gradient of at least one parameter")
    return total


def mean_cosine(gradients: Tensor, direction: Tensor) -> float:
    """Returns the mean cosine of [K, P] gradients to a [P] direction."""
    return torch.cosine_similarity(gradients, direction[None]).mean().item()


def signal_to_noise(gradients: Tensor) -> float:
    """Returns |E g|^2 / tr Cov g, both estimated unbiased, from [K, P] gradients of K batches.

    tr Cov = sum_k |g_k - mean|^2 / (K - 1), and |mean|^2 overestimates |E g|^2 by tr Cov / K. So
    pure noise gives about 0, now and then slightly less.
    """
    count = len(gradients)
    mean = gradients.mean(0)
    variance = (gradients - mean).square().sum() / (count - 1)
    return ((mean.square().sum() - variance / count) / variance).item()
