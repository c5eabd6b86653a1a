"""Several teachers, each of which scores the completions of its own domain."""

from collections.abc import Mapping
from dataclasses import replace

from poweropd.data.rollout import Example
from poweropd.teachers.base import TeacherScorer


class RoutedTeacher:
    """Routes examples by their domain and returns them in the order in which they came.

    The tokens of each have the loss weight of their teacher, by default 1.
    """

    def __init__(
        self, teachers: Mapping[str, TeacherScorer], weights: Mapping[str, float] | None = None
    ) -> None:
        self.teachers, self.weights = dict(teachers), weights or {}
        self._keys: list[tuple[int, int]] = []

    def submit(self, example: Example) -> None:
        self.teachers[example.prompt.domain].submit(example)
        self._keys.append(example.rollout.key)

    def collect(self) -> list[Example]:
        keys, self._keys = self._keys, []
        scored = {
            example.rollout.key: replace(example, loss_weight=self.weights.get(name, 1.0))
            for name, teacher in self.teachers.items()
            for example in teacher.collect()
        }
        return [scored[key] for key in keys if key in scored]
