"""The rules of a comparison and its possible outcomes; importing them loads nothing else."""

from dataclasses import dataclass

CORRECT = "correct"
WRONG = "wrong"
NO_ANSWER = "no_answer"
UNPARSED_ANSWER = "unparsed_answer"
UNPARSED_GOLD = "unparsed_gold"
TIMEOUT = "timeout"
CRASH = "crash"

#: Every reason a grade can have. Only `correct` counts as correct.
REASONS = {
    CORRECT: "the answer equals the gold answer",
    WRONG: "the answer was understood and differs from the gold answer",
    NO_ANSWER: "the completion states no answer, or its last box is empty",
    UNPARSED_ANSWER: "the answer is not mathematics that can be read, and not the gold's text",
    UNPARSED_GOLD: "the gold answer cannot be read, and the answer is not its very text",
    TIMEOUT: "the search or the comparison passed the time limit, or the answer is too long",
    CRASH: "the comparison failed with an error, or its process died; see Grade.detail",
}


@dataclass(frozen=True)
class Rule:
    """What a benchmark forgives beyond mathematical equality.

    relative_tolerance: allowed |answer - gold| / |gold| if the gold is written as a decimal
        (with a point or an exponent); integers and exact expressions stay exact.
    absolute_tolerance: allowed |answer - gold| for any numeric gold.
    unordered: whether a list without brackets ("3, 5, 7") may come in any order. Sets always
        may, tuples never.
    """

    relative_tolerance: float = 0.0
    absolute_tolerance: float = 0.0
    unordered: bool = True


@dataclass(frozen=True)
class Verdict:
    """The outcome of one comparison: a key of REASONS, and an error's text if there was one."""

    reason: str
    detail: str = ""
