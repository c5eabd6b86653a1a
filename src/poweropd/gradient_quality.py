"""How much of a run's gradient is signal, at the step where it is now. For small models: the
gradients of all batches are kept."""

from collections.abc import Sequence

import torch

from poweropd.batching import Batch, collate
from poweropd.data import PromptOrder
from poweropd.diagnostics import exact_gradient, gradients, mean_cosine, signal_to_noise
from poweropd.objectives import TokenRecord
from poweropd.rewards import Reward
from poweropd.rollouts.base import Request, completion_seed
from poweropd.trainer import Trainer
from poweropd.update import with_teacher

PROMPTS = 32  # of one batch


def measure(trainer: Trainer, count: int, cosine: bool = True) -> dict[str, float]:
    """Signal-to-noise ratio of the gradients of `count` fresh batches, by the run's own reward and
    objective and, where wanted, their mean cosine to the exact gradient of that reward."""
    student, teacher = trainer.student, trainer.models.teacher
    batches = fresh_batches(trainer, count)
    if cosine or trainer.config.needs_local_teacher:
        batches = [with_teacher(batch, teacher) for batch in batches]
    reward = _with_statistics(trainer, batches, trainer.reward.at(trainer.steps_done))
    own = gradients(student, batches, trainer.updater.make_objective, reward)
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
    objective = trainer.updater.make_objective(reward.unstandardized, 0.0)
    records = [trainer.student(batch, objective)[1] for batch in batches]
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
        Request(i, 0, p.prompt_ids, p.teacher_prompt_ids, completion_seed(seed, -1, i, 0))
        for i, p in enumerate(prompts)
    ]
    examples = trainer.scored(trainer.engine.generate(requests, trainer.sampling), prompts)
    groups = [examples[i::batches] for i in range(batches)]
    return [collate(group).to(trainer.accelerator.device) for group in groups]
