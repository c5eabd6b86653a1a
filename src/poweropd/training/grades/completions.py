"""Grades of a step's completions, given while others are still being sampled."""

import atexit
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Rollout
from poweropd.data.sources import column_names, find_value
from poweropd.errors import UsageError
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders.base import Asked, create_grader


class CompletionGrader:
    """A recipe's grader of completions, by the gold that a column of their prompt holds.

    A user's function gets the row of the prompt's data and what the student wrote as text without
    special tokens; it is called in this process, one completion at a time.
    """

    def __init__(
        self, key: str, named: str, column: str, tokenizer: Any, prompts: Sequence[Prompt]
    ) -> None:
        """Raises UsageError about `key` for a prompt without a gold that the grader takes."""
        self.key, self.column, self.tokenizer = key, column, tokenizer
        self.grader = create_grader(key, named)
        for prompt in prompts:
            self._gold(prompt)
        self.workers = Grader()
        atexit.register(self.workers.close, wait=False)

    def text(self, rollout: Rollout) -> str:
        """Returns what the student wrote as text without special tokens."""
        return str(self.tokenizer.decode(rollout.own_ids, skip_special_tokens=True))

    def submit(self, rollout: Rollout) -> "Future[Grade]":
        """Starts to grade a completion; raises RunError if the user's own code fails."""
        prompt = rollout.request.prompt
        asked = Asked(self._gold(prompt), prompt.row, place=f"row {prompt.index}")
        return self.grader.submit(self.workers, asked, self.text(rollout))

    def _gold(self, prompt: Prompt) -> object:
        """Returns the gold of a prompt; None if the grader needs none."""
        if not self.grader.needs_gold:
            return None
        try:
            return self.grader.gold(find_value(prompt.row, self.column), prompt.row)
        except ValueError as error:
            expected = self.grader.expected.format(f"column {self.column!r} of row {prompt.index}")
            section = self.key.rpartition(".")[0]
            raise UsageError(
                f"{section}.answer_column: expected {expected}, {error}; the columns are "
                f"{column_names(prompt.row)}"
            ) from None
