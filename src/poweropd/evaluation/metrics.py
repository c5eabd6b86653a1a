"""Figures of an evaluation, each with an interval over problems.

The problems of a benchmark are a sample of the problems that could have been asked; completions of
one problem resemble each other. So intervals come from resampling problems, never completions.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2_000
CONFIDENCE = 0.95
_FEW_VALUES = 32
_PSEUDO_PROBLEMS = (0.0, 1.0)
_DRAWS_AT_ONCE = 2**21
#: The name under which completions that ran into the length limit stand in `Summary.stops`.
TRUNCATED = "truncated"

Row = Mapping[str, Any]
_Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its bootstrap interval."""

    mean: float
    low: float
    high: float


# Per problem: [problems, n] -> [problems]


def _correct(correct: ArrayLike, k: int | None) -> tuple[NDArray[np.bool_], int]:
    """The grades as booleans, and k, checked against the n samples there are."""
    array = np.asarray(correct, dtype=bool)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected grades of shape [problems, n], got shape {array.shape}")
    n = array.shape[1]
    k = n if k is None else k
    if not 1 <= k <= n:
        raise ValueError(f"expected k from 1 to the {n} samples per problem, got k = {k}")
    return array, k


def avg_values(correct: ArrayLike, k: int | None = None) -> _Values:
    """The correct fraction of each problem's first k samples. [problems, n] -> [problems]"""
    array, k = _correct(correct, k)
    return array[:, :k].mean(axis=1)


def pass_values(correct: ArrayLike, k: int | None = None) -> _Values:
    """The chance that k samples of each problem, drawn without repeats, hold a correct one.

    1 - C(n - c, k) / C(n, k) with c of n correct (Chen et al., 2021, arXiv:2107.03374), as a
    product of k factors, so that no binomial overflows. [problems, n] -> [problems]
    """
    array, k = _correct(correct, k)
    n = array.shape[1]
    wrong = n - array.sum(axis=1)  # [problems]
    drawn = np.arange(k)  # samples drawn before
    factors = np.clip((wrong[:, None] - drawn) / (n - drawn), 0.0, None)  # [problems, k]
    return 1.0 - factors.prod(axis=1)


def maj_values(
    answers: Sequence[Sequence[Hashable]], correct: ArrayLike, k: int | None = None
) -> _Values:
    """Whether the most frequent answer of each problem's first k samples is correct.

    All correct answers are one answer, however they are written; wrong ones are told apart by their
    text; None (no answer) has no vote. Answers that tie share the win. [problems, n] -> [problems]
    """
    array, k = _correct(correct, k)
    if [len(row) for row in answers] != [array.shape[1]] * array.shape[0]:
        raise ValueError(f"expected answers of shape {array.shape}, as the grades have")
    return np.array(
        [
            _majority(row[:k], grades[:k])
            for row, grades in zip(answers, array.tolist(), strict=True)
        ]
    )


def _majority(answers: Sequence[Hashable], grades: Sequence[bool]) -> float:
    pairs = list(zip(answers, grades, strict=True))
    rivals = Counter(answer for answer, right in pairs if answer is not None and not right)
    right, most = sum(grades), max(rivals.values(), default=0)
    if right != most:
        return float(right > most)
    winners = sum(count == most for count in rivals.values())
    return 1.0 / (1 + winners) if right else 0.0


# Over problems


def avg_at_k(correct: ArrayLike, k: int | None = None) -> float:
    """The mean correct fraction over the first k samples of every problem.

    correct: [problems, n]; k: all n where None. Raises ValueError where n < k.
    """
    return float(avg_values(correct, k).mean())


def pass_at_k(correct: ArrayLike, k: int | None = None) -> float:
    """The unbiased chance that k samples solve a problem: mean of 1 - C(n - c, k) / C(n, k).

    correct: [problems, n]; k: all n where None. Raises ValueError where n < k.
    """
    return float(pass_values(correct, k).mean())


def maj_at_k(
    answers: Sequence[Sequence[Hashable]], correct: ArrayLike, k: int | None = None
) -> float:
    """The fraction of problems whose most frequent answer is correct; see `maj_values`."""
    return float(maj_values(answers, correct, k).mean())


# Intervals


def estimate(
    values: ArrayLike,
    *,
    fraction: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of one value per problem, with a percentile bootstrap interval over problems.

    fraction: the values lie in [0, 1]. The interval then also spans what the bootstrap gives with
    one problem at 0 and one at 1 added, for few problems near 0 or 1 look surer than they are:
    thirty failures would give the interval [0, 0]. At hundreds of problems this changes nothing.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"expected one value per problem, got shape {array.shape}")
    mean = float(array.mean())
    pools = [array, np.concatenate([array, _PSEUDO_PROBLEMS])] if fraction else [array]
    ends = [_interval(_resampled_means(pool, resamples, seed)) for pool in pools]
    return Estimate(mean, min(low for low, _ in ends), max(high for _, high in ends))


def paired_bootstrap(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The difference a - b of two evaluations over the same problems, with its interval.

    a, b: problem id -> value. Each resample takes both values of a problem, so what makes a problem
    hard for both cancels. Raises ValueError where the ids differ.
    """
    if a.keys() != b.keys():
        only_a, only_b = len(a.keys() - b.keys()), len(b.keys() - a.keys())
        raise ValueError(
            f"expected the same problem ids in both evaluations, got {only_a} only in the first "
            f"and {only_b} only in the second"
        )
    ids = sorted(a)
    return estimate([a[i] - b[i] for i in ids], resamples=resamples, seed=seed)


def estimate_over_seeds(
    *benchmarks: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean over benchmarks of several trainings' mean value, with its interval.

    benchmarks: [seeds, problems] values in [0, 1] each, with the same seeds. Trainings and problems
    are both samples, so each resample draws both (Owen 2007, The pigeonhole bootstrap, Annals of
    Applied Statistics 1(2)); from two or three seeds it learns little of how they vary, from one
    nothing. As in `estimate` of fractions, one problem at 0 and one at 1 may widen it.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in benchmarks]
    shapes = [array.shape for array in arrays]
    if not arrays or any(len(s) != 2 or 0 in s or s[0] != shapes[0][0] for s in shapes):
        raise ValueError(f"expected values of shape [seeds, problems], got shapes {shapes}")
    mean = float(np.mean([array.mean() for array in arrays]))
    added = [np.hstack([a, np.tile(_PSEUDO_PROBLEMS, (len(a), 1))]) for a in arrays]
    ends = [_interval(_means_over_seeds(pool, resamples, seed)) for pool in (arrays, added)]
    return Estimate(mean, min(low for low, _ in ends), max(high for _, high in ends))


def _means_over_seeds(arrays: Sequence[_Values], resamples: int, seed: int) -> _Values:
    """Means of `resamples` draws of seeds, common to all arrays, and of problems. [resamples]"""
    generator = np.random.default_rng(seed)
    seeds = len(arrays[0])
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    total = np.zeros(resamples)
    for array in arrays:
        count = array.shape[1]
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples) / count
        total += ((drawn_seeds @ array) * drawn).sum(1)
    return total / len(arrays)


def _resampled_means(pool: _Values, resamples: int, seed: int) -> _Values:
    """Means of `resamples` draws of as many values as there are. [resamples]"""
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(pool, return_counts=True)
    if distinct.size <= _FEW_VALUES:  # the rule for grades: only c of n correct can occur
        drawn = generator.multinomial(pool.size, counts / pool.size, size=resamples)
        return drawn @ distinct / pool.size
    at_once = max(1, _DRAWS_AT_ONCE // pool.size)
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    draws = (generator.integers(pool.size, size=(size, pool.size)) for size in sizes)
    return np.concatenate([pool[indices].mean(axis=1) for indices in draws])


def _interval(means: _Values) -> tuple[float, float]:
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


# A whole evaluation


@dataclass(frozen=True)
class Summary:
    """What an evaluation measured: `n` completions for each of `problems` problems, at k.

    stops: stop token -> completions ended by it; TRUNCATED -> those that hit the length limit.
    reasons: grading reason -> completions.
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


def summarize(
    rows: Sequence[Row],
    *,
    n: int | None = None,
    k: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Summary:
    """The figures of an evaluation's rows, one per completion, in any order.

    rows: mappings with `id` and `sample`, `correct`, `answer` (None for none), `reason`, `tokens`,
    `stop` (the stop token, None where truncated). n: the samples each problem must have. k: n where
    None. Raises ValueError where problems have different numbers of samples, or n < k.
    """
    groups = _by_problem(rows, n)
    correct = np.array([[row["correct"] for row in group] for group in groups.values()], bool)
    answers = [[row["answer"] for row in group] for group in groups.values()]
    k = correct.shape[1] if k is None else k

    def means(value: Callable[[Row], float]) -> _Values:
        return np.array([[value(row) for row in group] for group in groups.values()]).mean(axis=1)

    def fraction(values: _Values) -> Estimate:
        return estimate(values, fraction=True, resamples=resamples, seed=seed)

    return Summary(
        problems=len(groups),
        n=correct.shape[1],
        k=k,
        avg_at_k=fraction(avg_values(correct, k)),
        pass_at_k=fraction(pass_values(correct, k)),
        maj_at_k=fraction(maj_values(answers, correct, k)),
        mean_length=estimate(means(lambda row: row["tokens"]), resamples=resamples, seed=seed),
        truncated_fraction=fraction(means(lambda row: row["stop"] is None)),
        no_answer_fraction=fraction(means(lambda row: row["answer"] is None)),
        stops=_histogram(TRUNCATED if row["stop"] is None else str(row["stop"]) for row in rows),
        reasons=_histogram(str(row["reason"]) for row in rows),
    )


def problem_values(rows: Sequence[Row], *, n: int | None = None) -> dict[str, float]:
    """Each problem's correct fraction by id, as `paired_bootstrap` compares them."""
    groups = _by_problem(rows, n)
    return {key: sum(row["correct"] for row in group) / len(group) for key, group in groups.items()}


def _by_problem(rows: Sequence[Row], n: int | None) -> dict[str, list[Row]]:
    """Rows by problem id, in the order of their samples; every problem has n."""
    groups: dict[str, list[Row]] = {}
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


def _histogram(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())
