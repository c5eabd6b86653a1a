"""Finding answers in completions, and comparing them with gold answers."""

from poweropd.grading.grader import REASONS, Grade, Grader, Rule, grade

__all__ = ["REASONS", "Grade", "Grader", "Rule", "grade"]
