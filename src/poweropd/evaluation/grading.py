"""The grader under its former name; it lives in `poweropd.grading`."""

from poweropd.grading import REASONS, Grade, Grader, Rule, grade

__all__ = ["REASONS", "Grade", "Grader", "Rule", "grade"]
