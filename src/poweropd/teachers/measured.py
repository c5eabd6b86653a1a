"""Measures what quantizing a teacher does to rewards, on the first step's completions."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from poweropd.data.rollout import Example
from poweropd.rewards import Reward
from poweropd.runs.directory import RunDirectory
from poweropd.teachers.base import TeacherScorer, score

logger = logging.getLogger("poweropd")


class MeasuredTeacher:
    """Scores with `teacher`; its first examples are also scored by the unquantized teacher.

    `load_unquantized` is called for that once, unless the run directory holds the `effect` for the
    teacher of this domain from an earlier start.
    """

    def __init__(
        self,
        teacher: TeacherScorer,
        load_unquantized: Callable[[], TeacherScorer],
        reward: Reward,
        run: RunDirectory,
        domain: str = "",
    ) -> None:
        self.teacher, self.reward, self.run, self.domain = teacher, reward, run, domain
        self.load_unquantized = load_unquantized

    def submit(self, example: Example) -> None:
        self.teacher.submit(example)

    def collect(self) -> list[Example]:
        examples = self.teacher.collect()
        if examples and not self.run.quantization(self.domain):
            found = effect(examples, score(self.load_unquantized(), examples), self.reward)
            self.run.write_quantization(found, self.domain)
            logger.info("the quantized teacher: %s", found)
        return examples


def effect(
    quantized: Sequence[Example], unquantized: Sequence[Example], reward: Reward
) -> dict[str, float]:
    """Returns the mean |difference| of rewards and of the teacher's log-probs.

    The means are over `num_tokens` tokens. The student's log-probs are the sampler's, so tokens
    without one are left out. A z-score is measured before it is standardized.
    """
    ours, theirs = _log_probs(quantized), _log_probs(unquantized)
    student = torch.cat(
        [
            torch.full((e.num_tokens,), torch.nan) if (s := e.sampling_log_probs) is None else s
            for e in quantized
        ]
    )
    known = ~student.isnan()
    pointwise = reward.unstandardized
    difference = (pointwise(ours, student) - pointwise(theirs, student))[known]
    return {
        "mean_abs_reward_difference": difference.abs().double().mean().item(),
        "mean_abs_log_prob_difference": (ours - theirs)[known].abs().double().mean().item(),
        "num_tokens": len(difference),
    }


def _log_probs(examples: Sequence[Example]) -> Tensor:
    """Returns the teacher's log-probs of all examples in one [N] tensor."""
    return torch.cat([e.teacher_log_probs for e in examples if e.teacher_log_probs is not None])
