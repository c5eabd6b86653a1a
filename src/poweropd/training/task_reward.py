"""An outcome reward of each completion, added to its token rewards: `rollout.task_reward`."""

import atexit
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from poweropd.config.rollouts import TaskRewardConfig
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Example, Rollout
from poweropd.data.sources import column_names, find_value
from poweropd.errors import UsageError
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders.base import Asked, NamedGrader, create_grader

KEY = "rollout.task_reward"
Key = tuple[int, int]  # of a completion in its step


class TaskRewards:
    """Rewards completions while others are still being sampled.

    The reward is the score that a grader gives: 1 for a correct answer and 0 for any other. A
    user's function gets the row of the prompt's data and the completion as text without special
    tokens, and returns a finite number; it is called in this process, one completion at a time.
    """

    def __init__(
        self, section: TaskRewardConfig, tokenizer: Any, prompts: Sequence[Prompt]
    ) -> None:
        self.weight, self.tokenizer = section.weight, tokenizer
        self.grader = create_grader(f"{KEY}.name", section.name)
        self.golds = _golds(self.grader, section.answer_column, prompts)
        self.workers = Grader()
        atexit.register(self.workers.close, wait=False)
        self._waiting: dict[Key, Future[Grade]] = {}
        self.collected: list[float] = []  # of the last step's completions, without the weight

    def submit(self, rollout: Rollout) -> None:
        """Starts to reward a completion."""
        text = self.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
        prompt = rollout.request.prompt
        asked = Asked(self.golds.get(prompt.index), prompt.row, place=f"row {prompt.index}")
        self._waiting[rollout.key] = self.grader.submit(self.workers, asked, text)

    def added_to(self, examples: Sequence[Example]) -> list[Example]:
        """Returns the examples with the weighted rewards of their completions.

        All completions that were submitted since the last call count in `collected`, also those
        of which nothing is trained.
        """
        waiting, self._waiting = self._waiting, {}
        found = {key: future.result().score for key, future in waiting.items()}
        self.collected = list(found.values())
        return [replace(e, task_reward=self.weight * found[e.rollout.key]) for e in examples]


def _golds(grader: NamedGrader, column: str, prompts: Sequence[Prompt]) -> dict[int, object]:
    """Returns the gold of each prompt by its row; {} if the grader needs none."""
    golds = {}
    for prompt in prompts if grader.needs_gold else []:
        try:
            golds[prompt.index] = grader.gold(find_value(prompt.row, column), prompt.row)
        except ValueError as error:
            expected = grader.expected.format(f"column {column!r} of row {prompt.index}")
            raise UsageError(
                f"{KEY}.answer_column: expected {expected}, {error}; the columns are "
                f"{column_names(prompt.row)}"
            ) from None
    return golds
