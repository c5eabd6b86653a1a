"""Feedback on the student's completions, which their teacher reads: `data.feedback`."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from poweropd.config.data import DataConfig
from poweropd.data.messages import Tool
from poweropd.data.prompts import Prompt, RowReader, encoded
from poweropd.data.rollout import Example
from poweropd.data.teacher_prompts import Attempt
from poweropd.errors import RunError, UsageError
from poweropd.grading.grader import Grade
from poweropd.grading.rules import REASONS
from poweropd.teachers.base import TeacherScorer
from poweropd.teachers.factory import TeacherProfile
from poweropd.training.grades.completions import CompletionGrader

logger = logging.getLogger("poweropd")


class Feedback:
    """Gives each completion the teacher's prompt that tells of it and its grade.

    A completion whose prompt has then no room in the teacher's context is left out.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Any,
        teachers: Mapping[str, TeacherProfile],
        prompts: Sequence[Prompt],
        tools: list[Tool] | None = None,
    ) -> None:
        """`tokenizer` is the student's; raises UsageError for a prompt that cannot be graded.

        `tools` are those of prompts without tools of their own.
        """
        assert data.feedback is not None
        named = (data.feedback.grader, data.feedback.answer_column)
        self.grader = CompletionGrader("data.feedback.grader", *named, tokenizer, prompts)
        self.data, self.teachers, self.reader = data, teachers, RowReader(data, tools)
        self._waiting: list[tuple[Example, Future[Grade]]] = []
        self.grades: list[float] = []  # of the completions of the last call of `completed`
        self.left_out = 0  # of these
        self._told = False

    def submit(self, example: Example) -> None:
        """Starts to grade a completion."""
        self._waiting.append((example, self.grader.submit(example.rollout)))

    def completed(self) -> list[Example]:
        """Returns the examples since the last call, in their order, with the teacher's prompts.

        Raises RunError if a prompt cannot be made.
        """
        waiting, self._waiting = self._waiting, []
        graded = [(example, future.result()) for example, future in waiting]
        try:
            made = [self._with_prompt(example, grade) for example, grade in graded]
        except UsageError as error:  # the run was right until here, and goes on from a checkpoint
            raise RunError(str(error)) from error
        kept = [example for example in made if example is not None]
        self.grades = [grade.score for _, grade in graded]
        self.left_out = len(made) - len(kept)
        if self.left_out and not self._told:
            self._told = True
            logger.warning(
                "data.teacher_prompt: with the completion and its feedback, %d of %d prompts of "
                "this step have no room in the teacher's context and are not trained on "
                "(feedback/left_out_fraction): shorten it, or lower rollout.max_new_tokens",
                *(self.left_out, len(made)),
            )
        return kept

    def of(self, examples: Sequence[Example]) -> list[Example]:
        """Returns the examples that have room with the teacher's prompts, all at once."""
        for example in examples:
            self.submit(example)
        return self.completed()

    def _with_prompt(self, example: Example, grade: Grade) -> Example | None:
        """Returns the example with its teacher's prompt; None if that is too long."""
        rollout, prompt = example.rollout, example.prompt
        place, teacher = f"row {prompt.index}", self.teachers[prompt.domain]
        attempt = Attempt(self.grader.text(rollout), grade.score, said(grade))
        own = self.reader.student_prompt(place, prompt.row)
        theirs = self.reader.teacher_prompt(place, prompt.row, own, attempt)
        (ids,) = encoded(teacher.tokenizer, [theirs], self.data)
        if len(ids) + len(rollout.completion_ids) > teacher.context:
            return None
        request = replace(rollout.request, prompt=replace(prompt, teacher_prompt_ids=ids))
        return replace(example, rollout=replace(rollout, request=request))


class InformedTeacher:
    """A teacher that scores completions behind prompts which tell of their grades."""

    def __init__(self, teacher: TeacherScorer, feedback: Feedback) -> None:
        self.teacher, self.feedback = teacher, feedback

    def submit(self, example: Example) -> None:
        self.feedback.submit(example)

    def collect(self) -> list[Example]:
        for example in self.feedback.completed():
            self.teacher.submit(example)
        return self.teacher.collect()


def said(grade: Grade) -> str:
    """Returns what a grade says of a completion, in words."""
    reason = REASONS[grade.reason]
    return f"{reason}: {grade.detail}" if grade.detail else reason
