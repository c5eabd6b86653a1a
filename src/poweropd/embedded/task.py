"""The embedded pair's task: sums of six to eight digits, worked out one addition at a time.

A problem is the sum itself, `4+8+6+...`. Good work is a calculator's tape, every `=` pressed after
a term and the running total carried on, then the total in a box:

    4+8=12+6=18+...=41
    \\boxed{41}

The three splits are disjoint by construction: a problem's split is decided by a SHA-256 of its
sorted terms, so no evaluation sum is ever trained on, nor is one with the same terms in another
order.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "development", "evaluation"]

FEWEST_TERMS = 6
MOST_TERMS = 8
LARGEST_TERM = 9

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True)
class ToyProblem:
    """A sum and its total, both as text; `id` is a stable digest of the sum."""

    id: str
    problem: str
    answer: str

    @property
    def terms(self) -> list[int]:
        """The numbers to add, in order."""
        return [int(term) for term in self.problem.split("+")]


def split_of(terms: list[int]) -> Split:
    """The split a sum belongs to: 1/8 development, 1/8 evaluation, the rest train."""
    text = "+".join(str(term) for term in sorted(terms))
    bucket = hashlib.sha256(text.encode()).digest()[0] % 8
    if bucket == 0:
        return "development"
    return "evaluation" if bucket == 1 else "train"


def problems(split: Split, count: int, seed: int = 0) -> list[ToyProblem]:
    """`count` different problems of a split; the same arguments give the same list, anywhere.

    The first problems of a longer list are those of a shorter one. Raises ValueError for an
    unknown split.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}; got {split!r}")
    rng = random.Random(f"{split}-{seed}")
    found: dict[str, ToyProblem] = {}
    while len(found) < count:
        terms = [rng.randint(1, LARGEST_TERM) for _ in range(rng.randint(FEWEST_TERMS, MOST_TERMS))]
        if split_of(terms) == split:
            problem = _problem(terms)
            found[problem.id] = problem
    return list(found.values())


def worked_solution(problem: ToyProblem) -> str:
    """The completion of an exemplary student: every running total, then the boxed one."""
    total, *rest = problem.terms
    work = str(total)
    for term in rest:
        total += term
        work += f"+{term}={total}"
    return f"{work}\n\\boxed{{{total}}}"


def is_correct(problem: ToyProblem, completion: str) -> bool:
    """Whether the last `\\boxed{...}` of a completion holds exactly the answer."""
    boxed = _BOXED.findall(completion)
    return bool(boxed) and boxed[-1].strip() == problem.answer


def _problem(terms: list[int]) -> ToyProblem:
    text = "+".join(str(term) for term in terms)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return ToyProblem(id=digest[:12], problem=text, answer=str(sum(terms)))
