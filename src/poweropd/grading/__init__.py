"""Finding answers in completions, and comparing them with gold answers.

`from poweropd.grading import grade` loads the grader on first use; the table of graders in
`poweropd.grading.graders`, which recipes are checked by, loads nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poweropd.grading.grader import REASONS, Grade, Grader, Rule, grade

__all__ = ["REASONS", "Grade", "Grader", "Rule", "grade"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(f"{__name__}.grader"))[name]
