"""The grader `regex:PATTERN`: whether a pattern is found, or what its group holds."""

import re
from collections.abc import Mapping
from concurrent.futures import Future

from poweropd.grading import rules
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders.base import Asked, Plain
from poweropd.grading.graders.stated import comparable, shown_answer
from poweropd.grading.graders.text import Exact, as_list, text_golds
from poweropd.grading.rules import Verdict
from poweropd.grading.workers import search_in_worker


class Pattern(Plain):
    """Searches the completion for a regular expression of Python, in a worker, under a time limit.

    A pattern with a group finds the answer: what its first group (or the one called `answer`) holds
    in its last match is compared with the gold as `exact` does. A pattern without a group needs no
    gold: it is correct where it is found.
    """

    expected = Exact.expected

    def __init__(self, pattern: str) -> None:
        compiled = re.compile(pattern)
        self.pattern = pattern
        self.needs_gold = compiled.groups > 0
        self.group = compiled.groupindex.get("answer", 1 if compiled.groups else 0)

    def gold(self, value: object, row: Mapping[str, object]) -> object:
        """Returns the text, or the list of texts of which each is right."""
        return text_golds(value) if self.needs_gold else None

    def submit(self, workers: Grader, asked: Asked, completion: str) -> "Future[Grade]":
        """Returns a future of the grade, which never holds an exception."""

        def judge(found: str | None) -> tuple[str | None, Verdict]:
            if not self.needs_gold:
                return found or "", Verdict(rules.WRONG if found is None else rules.CORRECT)
            if found is None or not comparable(found):
                return None, Verdict(rules.NO_ANSWER)
            right = comparable(found) in {comparable(gold) for gold in as_list(asked.gold)}
            return shown_answer(found), Verdict(rules.CORRECT if right else rules.WRONG)

        work = (self.pattern, self.group, completion)
        return workers.submit_work(search_in_worker, work, judge)
