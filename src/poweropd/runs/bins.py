"""Fixed bins of completion positions and of token values, the same in every run and on every shard.

Counts in fixed bins merge by addition, so the statistics of the parts of a step add up to exactly
those of the whole. Every position below 32 has its own bin; from there on, an octave has four bins.
Values (rewards, log ratios) have four bins per octave of magnitude from 2^-14 to 2^10, one bin for
what is nearer to 0, and one for what lies beyond either end. So a quantile is known to 19% of its
magnitude, or to 2^-13 near 0.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

EXACT_POSITIONS, LONGEST = 32, 2**20
PER_OCTAVE = 4
SMALLEST, LARGEST = -14, 10  # exponents of 2
FAR = 4.0  # nats: the log ratio of a token beyond this is extreme


_OCTAVES = np.arange(PER_OCTAVE * np.log2(LONGEST / EXACT_POSITIONS)) / PER_OCTAVE
_LATER = (EXACT_POSITIONS * 2**_OCTAVES).round()
_MAGNITUDES = 2.0 ** (np.arange(SMALLEST * PER_OCTAVE, LARGEST * PER_OCTAVE + 1) / PER_OCTAVE)

#: [P] first position of each bin; the last one is open.
POSITION_STARTS = np.concatenate([np.arange(EXACT_POSITIONS), _LATER]).astype(np.int64)
#: [V - 1] bin i holds edge[i - 1] <= value < edge[i]; the first and the last bin are open.
VALUE_EDGES = np.concatenate([-_MAGNITUDES[::-1], _MAGNITUDES]).astype(np.float32)
NUM_POSITIONS, NUM_VALUES = len(POSITION_STARTS), len(VALUE_EDGES) + 1
ZERO_BIN = NUM_VALUES // 2

_STARTS, _EDGES = torch.from_numpy(POSITION_STARTS), torch.from_numpy(VALUE_EDGES)


def position_bins(positions: Tensor) -> Tensor:
    """Returns the [N] bins of completion positions >= 0, int64."""
    return torch.bucketize(positions.long(), _STARTS, right=True) - 1


def value_bins(values: Tensor) -> Tensor:
    """Returns the [N] bins of float32 values, int64; infinities are in the open bins."""
    return torch.bucketize(values, _EDGES, right=True)


def value_ends() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns the [V] lower and upper ends of the value bins; open bins end where they begin."""
    return (
        np.concatenate([VALUE_EDGES[:1], VALUE_EDGES]),
        np.concatenate([VALUE_EDGES, VALUE_EDGES[-1:]]),
    )


def quantile(counts: ArrayLike, q: float) -> float:
    """Returns the q-quantile of values whose bins hold `counts` [V]; NaN if they hold none.

    It is interpolated within the bin of the exact quantile (the smallest value with at least q of
    all values not above it), so it is off by less than that bin's width.
    """
    cumulative = np.cumsum(np.asarray(counts, dtype=np.int64))
    total = cumulative[-1]
    if total == 0:
        return float("nan")
    rank = max(1.0, q * total)
    found = int(np.searchsorted(cumulative, rank))
    before = cumulative[found - 1] if found else 0
    share = (rank - before) / (cumulative[found] - before)
    low, high = (float(ends[found]) for ends in value_ends())
    return low + share * (high - low)
