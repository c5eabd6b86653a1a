"""An outcome reward of each completion, added to its token rewards: `rollout.task_reward`."""

import atexit
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from poweropd.config.sections import TaskRewardConfig
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Example, Rollout
from poweropd.errors import RunError, UsageError, import_object
from poweropd.grading.golds import read_gold
from poweropd.grading.grader import Grader

Key = tuple[int, int]  # of a completion in its step
Score = Callable[[Mapping[str, Any], str], "Future[float]"]


class TaskRewards:
    """Rewards completions while others are still being sampled.

    A user's function gets the row of the prompt's data and the completion as text without special
    tokens, and returns a finite number; it is called in this process, one completion at a time. The
    grader gives 1 for a correct answer and 0 for any other.
    """

    def __init__(
        self, section: TaskRewardConfig, tokenizer: Any, prompts: Sequence[Prompt]
    ) -> None:
        self.weight, self.tokenizer = section.weight, tokenizer
        if section.name == "grader":
            self._score = _grader(section.answer_column, prompts)
        else:
            self._score = _function(section.name)
        self._waiting: dict[Key, Future[float]] = {}
        self.collected: list[float] = []  # of the last step's completions, without the weight

    def submit(self, rollout: Rollout) -> None:
        """Starts to reward a completion."""
        text = self.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
        self._waiting[rollout.key] = self._score(rollout.request.prompt.row, text)

    def added_to(self, examples: Sequence[Example]) -> list[Example]:
        """Returns the examples with the weighted rewards of their completions.

        All completions that were submitted since the last call count in `collected`, also those
        of which nothing is trained.
        """
        waiting, self._waiting = self._waiting, {}
        found = {key: future.result() for key, future in waiting.items()}
        self.collected = list(found.values())
        return [replace(e, task_reward=self.weight * found[e.rollout.key]) for e in examples]


def _grader(column: str, prompts: Sequence[Prompt]) -> Score:
    for prompt in prompts:
        try:
            read_gold(prompt.row.get(column))
        except ValueError as error:
            raise UsageError(
                f"rollout.task_reward.answer_column: expected text in column {column!r} of row "
                f"{prompt.index}, a number or a list of them, {error}; the columns are "
                f"{', '.join(prompt.row)}"
            ) from None
    grader = Grader()
    atexit.register(grader.close, wait=False)

    def score(row: Mapping[str, Any], completion: str) -> "Future[float]":
        reward = Future[float]()
        grade = grader.submit(row[column], completion)
        grade.add_done_callback(lambda done: reward.set_result(float(done.result().correct)))
        return reward

    return score


def _function(name: str) -> Score:
    function = import_object("rollout.task_reward.name", name)

    def score(row: Mapping[str, Any], completion: str) -> "Future[float]":
        value, reward = function(row, completion), Future[float]()
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RunError(f"rollout.task_reward {name}: expected a finite number, got {value!r}")
        reward.set_result(float(value))
        return reward

    return score
