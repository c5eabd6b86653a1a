"""The grader, where it was before it had a room of its own: see `poweropd.grading`."""

from poweropd.grading.grader import REASONS, Grade, Grader, Rule, grade

__all__ = ["REASONS", "Grade", "Grader", "Rule", "grade"]
