"""What all adapters share: log-probabilities of two models become per-token advantages."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poweropd import rewards
from poweropd.errors import RunError, UsageError, shown
from poweropd.net import NO_LOG_PROB, ROUNDING
from poweropd.rewards import Reward

#: The environment variable that names the reward, or holds it as JSON.
VARIABLE = "POWEROPD_REWARD"
DEFAULT = {"name": "power", "alpha": 5.0}


def reward_from_environment() -> Reward:
    """Returns the reward that POWEROPD_REWARD names, by default that of PowerOPD at alpha 5.

    The variable holds what a recipe has at `reward`, as JSON, {"name": "power", "alpha": 10}, or
    the name alone, for a reward's defaults.
    Raises UsageError if it holds anything else.
    """
    text = os.environ.get(VARIABLE)
    return reward_of(DEFAULT if text is None else text, VARIABLE)


def reward_of(spec: str | dict[str, Any] | Reward, key: str = "reward") -> Reward:
    """Returns a reward from its specification: a `Reward`, a dict, the JSON of one, or a name.

    key: what errors call the specification.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec} if spec.isidentifier() else _object_of(spec, key)
    if not isinstance(spec, dict) or "name" not in spec:
        raise UsageError(
            f'{key}: expected an object such as {{"name": "power", "alpha": 5}}, got {shown(spec)}'
        )
    try:
        return rewards.create(**spec)
    except ValueError as error:
        raise UsageError(f"{key}: {error}") from None


def _object_of(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{key}: expected JSON or a reward's name, got {shown(text)} ({error})"
        ) from None


@dataclass(frozen=True)
class Advantages:
    """The per-token advantages of a reward: r(t, p) of every sampled token, and nothing elsewhere.

    A trainer that hands over the tokens of a whole optimizer step at once says so, and then a
    reward may use their mean and standard deviation; from a part of them these would be wrong.
    """

    reward: Reward
    whole_step: bool = False

    def __post_init__(self) -> None:
        if self.reward.needs_reference:
            raise UsageError(
                f"reward: {type(self.reward).__name__} needs the log-probs of a reference model, "
                "which no other trainer hands over: choose another"
            )
        if self.reward.needs_statistics and not self.whole_step:
            raise UsageError(
                "reward: this trainer shows a part of a step at a time, and "
                f"{type(self.reward).__name__} needs the statistics of all of it: choose another"
            )

    def __call__(
        self,
        teacher_log_probs: Tensor,
        student_log_probs: Tensor,
        mask: Tensor,
        *,
        step: int | None = None,
        task_reward: Tensor | None = None,
    ) -> Tensor:
        """Returns the advantages: float32 without a gradient, 0 where the mask is 0.

        Args:
            teacher_log_probs, student_log_probs: ln t and ln p of the sampled tokens, of one shape
                and any float dtype, both at temperature 1. What the mask leaves out is not read.
            mask: of the same shape, bool or numbers; not 0 where a token is trained.
            step: the optimizer step from 0, for rewards that follow a schedule.
            task_reward: added to every trained token; of the same shape, or one dimension less
                for one number per completion.

        Raises UsageError if the shapes differ or a schedule has no step, and RunError if a
        log-prob of a trained token is no log-prob, or its reward is not finite: only a bounded
        reward has a value where the teacher's probability is 0.
        """
        if not teacher_log_probs.shape == student_log_probs.shape == mask.shape:
            raise UsageError(
                "advantages: expected teacher_log_probs, student_log_probs and mask of one shape, "
                f"got {list(teacher_log_probs.shape)}, {list(student_log_probs.shape)} and "
                f"{list(mask.shape)}"
            )
        trained = mask != 0
        teacher = _checked("teacher", teacher_log_probs[trained], none=True)
        student = _checked("student", student_log_probs[trained], none=False)
        values = self._at(step, teacher, student)(teacher, student)
        if not values.isfinite().all():
            raise RunError(
                "the teacher gives a sampled token probability 0, where the reward "
                f"{type(self.reward).__name__} is infinite: choose a bounded reward, such as power"
            )
        found = torch.zeros(mask.shape, dtype=torch.float32, device=values.device)
        found[trained] = values
        if task_reward is not None:
            own = task_reward.unsqueeze(-1) if task_reward.ndim < mask.ndim else task_reward
            found += own.detach().float() * trained
        return found

    def _at(self, step: int | None, teacher: Tensor, student: Tensor) -> Reward:
        """Returns the reward at a step, with the statistics of all its tokens."""
        if step is None and any(
            isinstance(v, rewards.Schedule) for v in vars(self.reward).values()
        ):
            raise UsageError(
                "reward: it follows a schedule, and this trainer does not say which step it is at: "
                "use a number"
            )
        reward = self.reward if step is None else self.reward.at(step)
        if not reward.needs_statistics or not teacher.numel():
            return reward
        base = reward.unstandardized(teacher, student).double()
        return reward.with_statistics(base.mean().item(), base.std(correction=0).item())


def reward_metrics(rewards: Tensor) -> dict[str, float]:
    """Returns what a trainer logs of the rewards of its trained tokens; {} without any."""
    if not rewards.numel():
        return {}
    return {
        "mean": rewards.mean().item(),
        "abs_mean": rewards.abs().mean().item(),
        "zero_fraction": (rewards == 0).float().mean().item(),
    }


def check_temperature(trainer: str, temperature: float) -> None:
    """Raises UsageError unless completions are sampled at 1, the temperature teachers score at."""
    if temperature != 1:
        raise UsageError(
            f"{trainer}: expected completions sampled at temperature 1, got {temperature}: the "
            "teacher's log-probs are at temperature 1, and the reward compares the two"
        )


def _checked(whose: str, log_probs: Tensor, none: bool) -> Tensor:
    """Returns log-probs, at most 0; raises RunError if they are none. A teacher's may be -inf."""
    log_probs = log_probs.detach()
    if none:
        # vLLM writes -9999 for minus infinity.
        log_probs = log_probs.masked_fill(log_probs <= NO_LOG_PROB, -torch.inf)
    good = (log_probs <= ROUNDING) & (
        log_probs.isfinite() | (log_probs == -torch.inf if none else False)
    )
    if not good.all():
        wrong = log_probs[~good][0].item()
        raise RunError(
            f"the {whose}'s log-probs of sampled tokens: expected numbers of at most 0, got {wrong}"
        )
    return log_probs.clamp(max=0.0)
