"""The task of the embedded pair: sums of six to eight digits, worked out one addition at a time.

A problem is the sum itself, `4+8+6+...`. A good solution looks like the tape of a calculator, with
the running total after each term, and then has the total in a box:

    4+8=12+6=18+...=41
    \\boxed{41}

The three splits are disjoint by construction: a SHA-256 of its sorted terms decides the split of a
problem, so training never sees a sum of the evaluation, nor one with the same terms in another
order. Shorter sums are in none of them: they are "other", prompts that are not the task's.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "development", "evaluation", "other"]

FEWEST_TERMS = 6
MOST_TERMS = 8
OTHER_FEWEST, OTHER_MOST = 3, 5
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
        """Returns the numbers to add, in order."""
        return [int(term) for term in self.problem.split("+")]


def split_of(terms: list[int]) -> Split:
    """Returns the split of a sum: 1/8 of all are development, 1/8 evaluation, the rest train.

    Sums of fewer terms than the task's are "other".
    """
    if len(terms) < FEWEST_TERMS:
        return "other"
    text = "+".join(str(term) for term in sorted(terms))
    bucket = hashlib.sha256(text.encode()).digest()[0] % 8
    if bucket == 0:
        return "development"
    return "evaluation" if bucket == 1 else "train"


def problems(split: Split, count: int, seed: int = 0) -> list[ToyProblem]:
    """Returns `count` different problems of a split; equal arguments give the same list anywhere.

    The first problems of a longer list are those of a shorter one. Raises ValueError for an
    unknown split.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}; got {split!r}")
    rng = random.Random(f"{split}-{seed}")
    lengths = (OTHER_FEWEST, OTHER_MOST) if split == "other" else (FEWEST_TERMS, MOST_TERMS)
    found: dict[str, ToyProblem] = {}
    while len(found) < count:
        terms = [rng.randint(1, LARGEST_TERM) for _ in range(rng.randint(*lengths))]
        if split_of(terms) == split:
            problem = _toy_problem(terms)
            found[problem.id] = problem
    return list(found.values())


def running_totals(problem: ToyProblem) -> str:
    """Returns the tape of a calculator that adds up the terms: `4+8=12+6=18+...=41`."""
    total, *rest = problem.terms
    work = str(total)
    for term in rest:
        total += term
        work += f"+{term}={total}"
    return work


def worked_solution(problem: ToyProblem) -> str:
    """Returns the completion of an exemplary student: each running total, then the boxed one."""
    return f"{running_totals(problem)}\n\\boxed{{{problem.answer}}}"


def is_correct(problem: ToyProblem, completion: str) -> bool:
    """Returns whether the last `\\boxed{...}` of a completion holds exactly the answer."""
    boxed = _BOXED.findall(completion)
    return bool(boxed) and boxed[-1].strip() == problem.answer


def _toy_problem(terms: list[int]) -> ToyProblem:
    text = "+".join(str(term) for term in terms)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return ToyProblem(id=digest[:12], problem=text, answer=str(sum(terms)))
