"""The figures of an evaluation, each with an interval over problems.

The problems of a benchmark are a sample of the problems that could have been asked, and completions
of one problem resemble each other. So intervals come from resampling problems, never completions.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2_000
CONFIDENCE = 0.95
_FEW_VALUES = 32
_PSEUDO_PROBLEMS = (0.0, 1.0)
_DRAWS_AT_ONCE = 2**21
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


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


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


# Intervals


def estimate(
    values: ArrayLike, *, fraction: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Returns the mean of one value per problem with a percentile bootstrap interval over problems.

    fraction: the values lie in [0, 1]. The interval then also spans the bootstrap interval with one
    problem at 0 and one at 1 added, because few problems near 0 or 1 look more certain than they
    are: thirty failures would give the interval [0, 0]. With hundreds of problems this changes
    nothing.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"expected one value per problem, got shape {array.shape}")
    pools = [array, np.concatenate([array, _PSEUDO_PROBLEMS])] if fraction else [array]
    return _spanning(array.mean(), [_resampled_means(pool, resamples, seed) for pool in pools])


def paired_bootstrap(
    a: Mapping[str, float], b: Mapping[str, float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Returns the difference a - b of two evaluations over the same problems, with its interval.

    a, b: problem id -> value. Each resample takes both values of a problem, so that what makes a
    problem hard for both cancels. Raises ValueError if the ids differ.
    """
    _check_paired(a, b)
    ids = sorted(a)
    return estimate([a[i] - b[i] for i in ids], resamples=resamples, seed=seed)


def estimate_ratio(
    totals: ArrayLike,
    counts: ArrayLike,
    *,
    fraction: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Returns sum(totals) / sum(counts), such as a mean over tokens, with its interval.

    totals, counts: one of each per problem, whose resamples take both; so long completions weigh
    as much as they have tokens, and problems are still what is sampled. fraction: as in `estimate`;
    the problems that are added have the mean count. Raises ValueError if all counts are 0.
    """
    pool = np.stack([np.asarray(one, dtype=np.float64) for one in (totals, counts)], axis=1)
    if not pool.size or not pool[:, 1].sum():
        raise ValueError("expected a problem with a count above 0, got none")
    mean = pool[:, 1].mean()
    added = [[share * mean, mean] for share in _PSEUDO_PROBLEMS]
    pools = [pool, np.concatenate([pool, added])] if fraction else [pool]
    ratios = [_resampled_ratios(one, resamples, seed) for one in pools]
    return _spanning(pool[:, 0].sum() / pool[:, 1].sum(), ratios)


def paired_ratios(
    a: Mapping[str, tuple[float, float]],
    b: Mapping[str, tuple[float, float]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Returns the difference of two ratios a - b over the same problems, with its interval.

    a, b: problem id -> (total, count), as `estimate_ratio` takes them. Each resample takes all four
    numbers of a problem, as in `paired_bootstrap`. Raises ValueError if the ids differ.
    """
    _check_paired(a, b)
    ids = sorted(a)
    pools = [np.array([side[i] for i in ids], dtype=np.float64) for side in (a, b)]
    one, other = (_resampled_ratios(pool, resamples, seed) for pool in pools)
    means = [pool[:, 0].sum() / pool[:, 1].sum() for pool in pools]
    return _spanning(means[0] - means[1], [one - other])


def estimate_over_seeds(
    *benchmarks: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Returns the mean over benchmarks of several trainings' mean value, with its interval.

    benchmarks: [seeds, problems] values in [0, 1] each, with the same seeds. Trainings and problems
    are both samples, so each resample draws both (Owen 2007, The pigeonhole bootstrap, Annals of
    Applied Statistics 1(2)). Two or three seeds say little about how seeds vary, and one says
    nothing. As in `estimate` with `fraction`, one problem at 0 and one at 1 may widen the interval.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in benchmarks]
    shapes = [array.shape for array in arrays]
    if not arrays or any(len(s) != 2 or 0 in s or s[0] != shapes[0][0] for s in shapes):
        raise ValueError(f"expected values of shape [seeds, problems], got shapes {shapes}")
    mean = np.mean([array.mean() for array in arrays])
    added = [np.hstack([a, np.tile(_PSEUDO_PROBLEMS, (len(a), 1))]) for a in arrays]
    return _spanning(mean, [_means_over_seeds(pool, resamples, seed) for pool in (arrays, added)])


def paired_over_seeds(
    *benchmarks: tuple[ArrayLike, ArrayLike], resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Returns the mean difference a - b of several trainings over benchmarks, with its interval.

    benchmarks: (a, b) each, both [seeds, problems] with the same seeds and problems in the same
    order. Differences are taken within a seed and a problem, so that what makes both models fail
    cancels; then seeds and problems are drawn as in `estimate_over_seeds`. With one seed this is
    `paired_bootstrap`, whose interval is over problems alone.
    """
    differences = [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in benchmarks]
    shapes = [array.shape for array in differences]
    if not differences or any(len(s) != 2 or 0 in s or s[0] != shapes[0][0] for s in shapes):
        raise ValueError(f"expected pairs of shape [seeds, problems], got differences of {shapes}")
    mean = np.mean([array.mean() for array in differences])
    return _spanning(mean, [_means_over_seeds(differences, resamples, seed)])


def _spanning(mean: np.floating, bootstraps: Sequence[_Values]) -> Estimate:
    """Returns a mean with an interval that spans the intervals of all bootstraps."""
    tail = (1.0 - CONFIDENCE) / 2
    lows, highs = zip(*(np.quantile(b, [tail, 1.0 - tail]) for b in bootstraps), strict=True)
    return Estimate(float(mean), float(min(lows)), float(max(highs)))


def _means_over_seeds(arrays: Sequence[_Values], resamples: int, seed: int) -> _Values:
    """Draws seeds, the same for all arrays, and problems; returns the means. [resamples]"""
    generator = np.random.default_rng(seed)
    seeds = len(arrays[0])
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    total = np.zeros(resamples)
    for array in arrays:
        count = array.shape[1]
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples) / count
        total += ((drawn_seeds @ array) * drawn).sum(1)
    return total / len(arrays)


def _check_paired(a: Mapping[str, object], b: Mapping[str, object]) -> None:
    """Raises ValueError if two evaluations are not over the same problems."""
    if a.keys() != b.keys():
        only_a, only_b = len(a.keys() - b.keys()), len(b.keys() - a.keys())
        raise ValueError(
            f"expected the same problem ids in both evaluations, got {only_a} only in the first "
            f"and {only_b} only in the second"
        )


def _resampled_ratios(pool: _Values, resamples: int, seed: int) -> _Values:
    """Draws as many rows of [problems, 2] as there are, `resamples` times; returns the ratios.

    The same rows are drawn of every pool of one length. A resample without any count has the ratio
    of the whole pool. [resamples]
    """
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // len(pool))
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    draws = (generator.integers(len(pool), size=(size, len(pool))) for size in sizes)
    totals, counts = np.concatenate([pool[indices].sum(axis=1) for indices in draws]).T
    whole = np.full(resamples, pool[:, 0].sum() / pool[:, 1].sum())
    return np.divide(totals, counts, out=whole, where=counts > 0)


def _resampled_means(pool: _Values, resamples: int, seed: int) -> _Values:
    """Draws as many values as there are, `resamples` times; returns the means. [resamples]"""
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(pool, return_counts=True)
    if distinct.size <= _FEW_VALUES:  # usual for grades, which are c of n
        drawn = generator.multinomial(pool.size, counts / pool.size, size=resamples)
        return drawn @ distinct / pool.size
    at_once = max(1, _DRAWS_AT_ONCE // pool.size)
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    draws = (generator.integers(pool.size, size=(size, pool.size)) for size in sizes)
    return np.concatenate([pool[indices].mean(axis=1) for indices in draws])


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
                f"expected {wanted} completions of every problem, got {len(group)} of {key!r}"
            )
    return dict(sorted(groups.items()))


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())
