"""Means over problems and their differences, each with a bootstrap interval over problems.

The problems of a benchmark are a sample of the problems that could have been asked, and completions
of one problem resemble each other. So intervals come from resampling problems, never completions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2_000
CONFIDENCE = 0.95
_FEW_VALUES = 32
_PSEUDO_PROBLEMS = (0.0, 1.0)
_DRAWS_AT_ONCE = 2**21

_Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


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


def ratio_over_seeds(
    totals: ArrayLike, counts: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Returns sum(totals) / sum(counts) of several trainings, such as a mean over tokens.

    totals, counts: [seeds, problems]. Resamples draw seeds and problems, as `estimate_over_seeds`
    does, with both numbers of each. Raises ValueError if all counts are 0.
    """
    pair = _ratio_pair(totals, counts)
    return _spanning(pair[0].sum() / pair[1].sum(), [_ratios_over_seeds(pair, resamples, seed)])


def paired_ratios_over_seeds(
    a: tuple[ArrayLike, ArrayLike],
    b: tuple[ArrayLike, ArrayLike],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Returns the difference of two ratios a - b of several trainings, with its interval.

    a, b: (totals, counts), all [seeds, problems] with the same seeds and problems in the same
    order. Each resample takes the same seeds and problems of both. With one seed the interval is
    over problems alone.
    """
    one, other = _ratio_pair(*a), _ratio_pair(*b)
    if one.shape != other.shape:
        raise ValueError(f"expected pairs of one shape, got {one.shape[1:]} and {other.shape[1:]}")
    means = [pair[0].sum() / pair[1].sum() for pair in (one, other)]
    own, others = (_ratios_over_seeds(pair, resamples, seed) for pair in (one, other))
    return _spanning(means[0] - means[1], [own - others])


def _ratio_pair(totals: ArrayLike, counts: ArrayLike) -> _Values:
    """Returns totals and counts as one array, [2, seeds, problems]."""
    pair = np.stack([np.asarray(totals, np.float64), np.asarray(counts, np.float64)])
    if pair.ndim != 3 or not pair.size or not pair[1].sum():
        raise ValueError(f"expected counts [seeds, problems] above 0, got shape {pair.shape[1:]}")
    return pair


def _ratios_over_seeds(pair: _Values, resamples: int, seed: int) -> _Values:
    """Draws seeds and problems, the same ones for equal shapes; returns the ratios. [resamples]

    A resample without any count has the ratio of the whole.
    """
    generator = np.random.default_rng(seed)
    _, seeds, problems = pair.shape
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    drawn = generator.multinomial(problems, np.full(problems, 1 / problems), size=resamples)
    totals, counts = (((drawn_seeds @ array) * drawn).sum(1) for array in pair)
    whole = np.full(resamples, pair[0].sum() / pair[1].sum())
    return np.divide(totals, counts, out=whole, where=counts > 0)


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
