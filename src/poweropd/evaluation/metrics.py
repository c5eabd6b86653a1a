"""The figures of an evaluation, each with an interval over problems.

`intervals.py` has the intervals.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from poweropd.evaluation.intervals import (
    Estimate,
    estimate,
    estimate_over_seeds,
    paired_bootstrap,
    paired_over_seeds,
)

__all__ = [
    "NO_ANSWER",
    "TRUNCATED",
    "Estimate",
    "GradedPart",
    "GradedRow",
    "Summary",
    "avg_at_k",
    "avg_values",
    "estimate",
    "estimate_over_seeds",
    "maj_at_k",
    "maj_values",
    "paired_bootstrap",
    "paired_over_seeds",
    "pass_at_k",
    "pass_values",
    "problem_values",
    "score_of",
    "summarize",
]

#: The key in `Summary.stops` of the completions that reached the length limit.
TRUNCATED = "truncated"
#: The grading reason of completions in which no answer was found.
NO_ANSWER = "no_answer"
_SHOWN_COMPLETIONS, _SHOWN_CHARACTERS = 3, 400

_Values = NDArray[np.float64]


class GradedPart(TypedDict):
    """The grade of a completion, as its row has it."""

    answer: str | None
    correct: bool  # a score of at least 1
    score: NotRequired[float]  # absent in rows of the first release, where it is 0 or 1
    scores: NotRequired[dict[str, float]]  # further ones, by name
    reason: str  # a key of poweropd.grading.REASONS
    detail: NotRequired[str]  # the text of an error of the comparison


class GradedRow(GradedPart):
    """One completion with its grade: a line of the JSONL file of an evaluation."""

    id: str  # of the problem
    sample: int  # which of the n completions of this problem it is
    completion: NotRequired[str]
    tokens: int
    stop: str | None  # the stop token; None if the completion is truncated


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -(2**53) < value < 2**53  # type: ignore[operator]


#: What the fields of a row may hold; those that are not there are not looked at.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "id": ("text", lambda v: isinstance(v, str)),
    "sample": ("an integer", lambda v: type(v) is int),
    "completion": ("text", lambda v: isinstance(v, str)),
    "tokens": ("a number of tokens", lambda v: _is_number(v) and v >= 0),
    "stop": ("text or null", lambda v: v is None or isinstance(v, str)),
    "answer": ("text or null", lambda v: v is None or isinstance(v, str)),
    "correct": ("true or false", lambda v: isinstance(v, bool)),
    "score": ("a number", _is_number),
    "scores": (
        "numbers by name",
        lambda v: isinstance(v, dict) and all(map(_is_number, v.values())),
    ),
    "reason": ("text", lambda v: isinstance(v, str)),
}


def check_row(
    row: Mapping[str, object], needed: Collection[str] = GradedRow.__required_keys__
) -> None:
    """Raises ValueError, which names the field, unless a row that was read is one of ours."""
    for key, (expected, fits) in _FIELDS.items():
        if key in needed and key not in row:
            raise ValueError(f"expected {expected} in {key!r}, got nothing")
        if key in row and not fits(row[key]):
            raise ValueError(f"expected {expected} in {key!r}, got {row[key]!r:.80}")


# Figures of each problem: [problems, n] -> [problems]


def _checked_grades(correct: ArrayLike, k: int | None) -> tuple[NDArray[np.bool_], int]:
    """Returns the grades as booleans, and k. Raises ValueError unless 1 <= k <= n."""
    array = np.asarray(correct, dtype=bool)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected grades of shape [problems, n], got shape {array.shape}")
    n = array.shape[1]
    k = n if k is None else k
    if not 1 <= k <= n:
        raise ValueError(f"expected k from 1 to the {n} samples per problem, got k = {k}")
    return array, k


def avg_values(scores: ArrayLike, k: int | None = None) -> _Values:
    """Returns the mean score of a problem's first k samples. [problems, n] -> [problems]

    scores: numbers, or whether each sample is correct; of these the mean is the correct fraction.
    """
    array = np.asarray(scores, dtype=np.float64)
    _, k = _checked_grades(array, k)
    return array[:, :k].mean(axis=1)


def pass_values(correct: ArrayLike, k: int | None = None) -> _Values:
    """Returns the chance that k samples of a problem, drawn without repeats, hold a correct one.

    It is 1 - C(n - c, k) / C(n, k) with c of n correct (Chen et al., 2021, arXiv:2107.03374),
    computed as a product of k factors, so that no binomial overflows. [problems, n] -> [problems]
    """
    array, k = _checked_grades(correct, k)
    n = array.shape[1]
    wrong = n - array.sum(axis=1)  # [problems]
    drawn = np.arange(k)  # samples drawn before
    factors = np.clip((wrong[:, None] - drawn) / (n - drawn), 0.0, None)  # [problems, k]
    return 1.0 - factors.prod(axis=1)


def maj_values(
    answers: Sequence[Sequence[Hashable]], correct: ArrayLike, k: int | None = None
) -> _Values:
    """Returns whether the most frequent answer of each problem's first k samples is correct.

    All correct answers are one answer, however they are written; wrong ones are told apart by their
    text; None (no answer) has no vote. Answers that tie share the win. [problems, n] -> [problems]
    """
    array, k = _checked_grades(correct, k)
    if [len(row) for row in answers] != [array.shape[1]] * array.shape[0]:
        raise ValueError(f"expected answers of shape {array.shape}, as the grades have")
    pairs = zip(answers, array.tolist(), strict=True)
    return np.array([_majority(row[:k], grades[:k]) for row, grades in pairs])


def _majority(answers: Sequence[Hashable], grades: Sequence[bool]) -> float:
    """Returns 1 if the most frequent answer is correct, 0 if not, a share of 1 for a tie."""
    pairs = list(zip(answers, grades, strict=True))
    rivals = Counter(answer for answer, right in pairs if answer is not None and not right)
    right, most = sum(grades), max(rivals.values(), default=0)
    if right != most:
        return float(right > most)
    winners = sum(count == most for count in rivals.values())
    return 1.0 / (1 + winners) if right else 0.0


# Figures over all problems


def avg_at_k(scores: ArrayLike, k: int | None = None) -> float:
    """Returns the mean score, or correct fraction, over the first k samples of every problem.

    scores: [problems, n]; k: None means all n. Raises ValueError if n < k.
    """
    return float(avg_values(scores, k).mean())


def pass_at_k(correct: ArrayLike, k: int | None = None) -> float:
    """Returns the unbiased chance that k samples solve a problem.

    It is the mean of 1 - C(n - c, k) / C(n, k), with c of n samples of a problem correct.
    correct: [problems, n]; k: None means all n. Raises ValueError if n < k.
    """
    return float(pass_values(correct, k).mean())


def maj_at_k(
    answers: Sequence[Sequence[Hashable]], correct: ArrayLike, k: int | None = None
) -> float:
    """Returns the fraction of problems whose most frequent answer is correct; see `maj_values`."""
    return float(maj_values(answers, correct, k).mean())


# A whole evaluation


@dataclass(frozen=True)
class Summary:
    """The figures of an evaluation of `problems` problems with `n` completions each.

    k: how many completions avg_at_k, pass_at_k and maj_at_k are about.
    stops: stop token -> completions that end with it; TRUNCATED -> those at the length limit.
    reasons: grading reason -> completions.
    solved: problem id -> mean score of its completions, which is their correct fraction for all
        graders but those of the user's own that give parts of 1.
    correct: problem id -> correct fraction, if it is not the mean score; {} if it is.
    scores: further scores by name, over all n completions.
    unanswered: three completions without an answer, if more than half of them have none.
    """

    problems: int
    n: int
    k: int
    avg_at_k: Estimate
    pass_at_k: Estimate
    maj_at_k: Estimate
    mean_length: Estimate
    truncated_fraction: Estimate
    no_answer_fraction: Estimate
    stops: dict[str, int]
    reasons: dict[str, int]
    solved: dict[str, float]
    correct: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Estimate] = field(default_factory=dict)
    unanswered: list[str] = field(default_factory=list)


def summarize(rows: Sequence[GradedRow], *, n: int | None = None, k: int | None = None) -> Summary:
    """Returns the figures of an evaluation from its rows, one per completion, in any order.

    n: the number of samples each problem must have. k: None means n. Raises ValueError if problems
    have different numbers of samples, or if n < k.
    """
    groups = _by_problem(rows, n)
    correct = np.array([[row["correct"] for row in group] for group in groups.values()], bool)
    scores = np.array([[score_of(row) for row in group] for group in groups.values()])
    answers = [[row["answer"] for row in group] for group in groups.values()]
    k = correct.shape[1] if k is None else k
    fractions = dict(zip(groups, correct.mean(axis=1).tolist(), strict=True))

    def means(value: Callable[[GradedRow], float]) -> _Values:
        return np.array([[value(row) for row in group] for group in groups.values()]).mean(axis=1)

    def means_of(name: str) -> _Values:
        return means(lambda row: row["scores"][name])

    fraction = partial(estimate, fraction=True)
    return Summary(
        problems=len(groups),
        n=correct.shape[1],
        k=k,
        avg_at_k=_of_scores(avg_values(scores, k)),
        pass_at_k=fraction(pass_values(correct, k)),
        maj_at_k=fraction(maj_values(answers, correct, k)),
        mean_length=estimate(means(lambda row: row["tokens"])),
        truncated_fraction=fraction(means(lambda row: row["stop"] is None)),
        no_answer_fraction=fraction(means(lambda row: row["answer"] is None)),
        stops=_counts(TRUNCATED if row["stop"] is None else str(row["stop"]) for row in rows),
        reasons=_counts(str(row["reason"]) for row in rows),
        solved=problem_values(rows),
        correct=fractions if (scores != correct).any() else {},
        scores={name: _of_scores(means_of(name)) for name in _score_names(rows)},
        unanswered=_unanswered(rows),
    )


def score_of(row: GradedRow) -> float:
    """Returns the score of a completion."""
    return row.get("score", float(row["correct"]))


def problem_values(rows: Sequence[GradedRow], *, n: int | None = None) -> dict[str, float]:
    """Returns each problem's mean score by id, as `paired_bootstrap` compares them."""
    groups = _by_problem(rows, n)
    return {key: sum(map(score_of, group)) / len(group) for key, group in groups.items()}


def _score_names(rows: Sequence[GradedRow]) -> list[str]:
    """Returns the names of the further scores; raises ValueError unless all rows have the same."""
    names = list(rows[0].get("scores", {}))
    for row in rows:
        if row.get("scores", {}).keys() != set(names):
            raise ValueError(
                f"expected the scores {', '.join(names) or 'none'} of every completion, as of the "
                f"first, got {', '.join(row.get('scores', {})) or 'none'} of {row['id']!r}"
            )
    return names


def _of_scores(values: _Values) -> Estimate:
    """Returns the mean of scores, as a fraction if all of them lie in [0, 1]."""
    return estimate(values, fraction=bool(values.min() >= 0 and values.max() <= 1))


def _unanswered(rows: Sequence[GradedRow]) -> list[str]:
    """Returns the first completions without an answer, shortened, if more than half have none."""
    without = [row for row in rows if row["reason"] == NO_ANSWER]
    if 2 * len(without) <= len(rows):
        return []
    texts = [row.get("completion", "") for row in without[:_SHOWN_COMPLETIONS]]
    half = _SHOWN_CHARACTERS // 2
    return [t if len(t) <= 2 * half else f"{t[:half]} ... {t[-half:]}" for t in texts]


def _by_problem(rows: Sequence[GradedRow], n: int | None) -> dict[str, list[GradedRow]]:
    """Groups rows by problem id, in the order of their samples; raises unless each has n."""
    groups: dict[str, list[GradedRow]] = {}
    for row in sorted(rows, key=lambda row: row["sample"]):
        groups.setdefault(str(row["id"]), []).append(row)
    if not groups:
        raise ValueError("expected the rows of at least one completion, got none")
    wanted = max(map(len, groups.values())) if n is None else n
    for key, group in groups.items():
        if len(group) != wanted:
            raise ValueError(
                f"expected {wanted} completions of every problem, got {len(group)} of {key!r:.80}"
            )
    return dict(sorted(groups.items()))


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())
