"""Several teachers, each of which scores the completions of its own domain."""

from collections.abc import Mapping

from poweropd.data.rollout import Example
from poweropd.teachers.base import TeacherScorer


class RoutedTeacher:
    """Routes examples by their domain and returns them in the order in which they came."""

    def __init__(self, teachers: Mapping[str, TeacherScorer]) -> None:
        self.teachers = dict(teachers)
        self._keys: list[tuple[int, int]] = []

    def submit(self, example: Example) -> None:
        self.teachers[example.prompt.domain].submit(example)
        self._keys.append(example.rollout.key)

    def collect(self) -> list[Example]:
        keys, self._keys = self._keys, []
        collected = (e for teacher in self.teachers.values() for e in teacher.collect())
        scored = {example.rollout.key: example for example in collected}
        return [scored[key] for key in keys if key in scored]
