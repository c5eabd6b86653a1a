"""Several teachers, each of which scores the completions of its own domain."""

from collections.abc import Mapping

from poweropd.data.rollout import Example
from poweropd.teachers.base import TeacherScorer


class RoutedTeacher:
    """Routes examples by their domain and returns them in the order in which they came."""

    def __init__(self, teachers: Mapping[str, TeacherScorer]) -> None:
        self.teachers = dict(teachers)
        self._domains: list[str] = []

    def submit(self, example: Example) -> None:
        domain = example.prompt.domain
        self.teachers[domain].submit(example)
        self._domains.append(domain)

    def collect(self) -> list[Example]:
        domains, self._domains = self._domains, []
        scored = {name: iter(teacher.collect()) for name, teacher in self.teachers.items()}
        return [next(scored[domain]) for domain in domains]
