"""An outcome reward of each completion, added to its token rewards: `rollout.task_reward`."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from poweropd.config.rollouts import ENVIRONMENT, TaskRewardConfig
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Example, Rollout
from poweropd.errors import RunError
from poweropd.grading.grader import Grade
from poweropd.training.grades.completions import CompletionGrader

KEY = "rollout.task_reward.name"
Key = tuple[int, int]  # of a completion in its step


class TaskRewards:
    """Rewards completions while others are still being sampled.

    The reward is the score that a grader gives: 1 for a correct answer and 0 for any other, or the
    finite number of a user's function. `environment` is the reward that `rollout.environment` gave.
    """

    def __init__(
        self, section: TaskRewardConfig, tokenizer: Any, prompts: Sequence[Prompt]
    ) -> None:
        self.weight = section.weight
        self.grader: CompletionGrader | None = None
        if section.name != ENVIRONMENT:
            named = (section.name, section.answer_column)
            self.grader = CompletionGrader(KEY, *named, tokenizer, prompts)
        self._waiting: dict[Key, Future[Grade]] = {}
        self.collected: list[float] = []  # of the last step's completions, without the weight

    def submit(self, rollout: Rollout) -> None:
        """Starts to reward a completion."""
        grade = _given(rollout) if self.grader is None else self.grader.submit(rollout)
        self._waiting[rollout.key] = grade

    def added_to(self, examples: Sequence[Example]) -> list[Example]:
        """Returns the examples with the weighted rewards of their completions.

        All completions that were submitted since the last call count in `collected`, also those
        of which nothing is trained.
        """
        waiting, self._waiting = self._waiting, {}
        found = {key: future.result().score for key, future in waiting.items()}
        self.collected = list(found.values())
        return [replace(e, task_reward=self.weight * found[e.rollout.key]) for e in examples]


def _given(rollout: Rollout) -> "Future[Grade]":
    """Returns a future of the reward that an environment gave, which is there already."""
    score = None if rollout.turns is None else rollout.turns.reward
    if score is None:
        raise RunError(f"{KEY}: environment: expected a reward of rollout.environment, got none")
    future: Future[Grade] = Future()
    future.set_result(Grade(score >= 1.0, None, "", score=score))
    return future
