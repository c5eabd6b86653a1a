"""Reward statistics of trained tokens as tables that merge exactly.

Counts and sums are integers (sums in units of 2^-30), minima and maxima are floats: merging in any
order and any grouping gives the same bits.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from poweropd.rewards import log_ratio
from poweropd.runs.bins import NUM_POSITIONS, NUM_VALUES, POSITION_STARTS, position_bins, value_bins

UNIT = 2.0**-30  # of all sums
LARGEST_IN_SUMS = 2.0**16  # larger values, such as a teacher's minus infinity, count as this
STEPS_PER_BLOCK = 10  # of the histograms, which would be large if they were kept for every step


class TrainedTokens(Protocol):
    """What is recorded of N trained tokens: [N] on the CPU each, float32 but for `positions`."""

    @property
    def positions(self) -> Tensor: ...
    @property
    def rewards(self) -> Tensor: ...
    @property
    def student_log_probs(self) -> Tensor: ...
    @property
    def teacher_log_probs(self) -> Tensor: ...
    @property
    def entropy(self) -> Tensor: ...
    @property
    def top1(self) -> Tensor: ...
    @property
    def teacher_entropy(self) -> Tensor: ...
    @property
    def teacher_top1(self) -> Tensor: ...


#: One row per optimizer step (from 1) and bin of positions, named by its first position.
#: `top1` counts tokens that are the student's most probable ones; `teacher_*` and `both_top1` are
#: null where the teacher gave log-probabilities alone, else about `teacher_count` tokens.
POSITIONS = pa.schema(
    [
        *((name, pa.int32()) for name in ("step", "position", "count")),
        *((f"{name}_sum", pa.int64()) for name in ("reward", "log_ratio", "entropy")),
        *((f"reward_{end}", pa.float32()) for end in ("min", "max")),
        *((f"log_ratio_{end}", pa.float32()) for end in ("min", "max")),
        ("top1", pa.int32()),
        ("teacher_count", pa.int32()),
        ("teacher_entropy_sum", pa.int64()),
        ("teacher_top1", pa.int32()),
        ("both_top1", pa.int32()),
    ],
    metadata={"unit of sums": "2^-30"},
)
_OF_TEACHER = {"teacher_entropy_sum", "teacher_top1", "both_top1"}
#: One row per block of 10 steps (named by its first), bin of positions, quantity and value bin.
HISTOGRAM = pa.schema(
    [
        ("step", pa.int32()),
        ("position", pa.int32()),
        ("quantity", pa.string()),
        ("value_bin", pa.int16()),
        ("count", pa.int64()),
    ]
)
_KEYS = {"step", "position", "quantity", "value_bin"}


def position_table(step: int, tokens: TrainedTokens) -> pa.Table:
    """Statistics of one step's tokens by completion position; schema POSITIONS."""
    sums = _Sums(position_bins(tokens.positions))
    known = ~tokens.teacher_entropy.isnan()
    top1, teacher_top1 = tokens.top1 > 0, known & (tokens.teacher_top1 > 0)
    log_ratios = log_ratio(tokens.teacher_log_probs, tokens.student_log_probs)
    count, teacher_count = sums.of(torch.ones_like(known)), sums.of(known)
    columns = {
        "step": torch.full_like(count, step),
        "position": torch.from_numpy(POSITION_STARTS),
        "count": count,
        "reward_sum": sums.of(_fixed(tokens.rewards)),
        "log_ratio_sum": sums.of(_fixed(log_ratios)),
        "entropy_sum": sums.of(_fixed(tokens.entropy)),
        "reward_min": sums.extreme(tokens.rewards, "amin"),
        "reward_max": sums.extreme(tokens.rewards, "amax"),
        "log_ratio_min": sums.extreme(log_ratios, "amin"),
        "log_ratio_max": sums.extreme(log_ratios, "amax"),
        "top1": sums.of(top1),
        "teacher_count": teacher_count,
        "teacher_entropy_sum": sums.of(_fixed(tokens.teacher_entropy)),
        "teacher_top1": sums.of(teacher_top1),
        "both_top1": sums.of(top1 & teacher_top1),
    }
    return _table(columns, count > 0, unknown=teacher_count == 0)


class _Sums:
    """Of [N] values in [P] bins."""

    def __init__(self, bins: Tensor) -> None:
        self.bins = bins

    def of(self, values: Tensor) -> Tensor:
        return torch.zeros(NUM_POSITIONS, dtype=torch.int64).index_add_(0, self.bins, values.long())

    def extreme(self, values: Tensor, which: str) -> Tensor:
        start = torch.zeros(NUM_POSITIONS, dtype=values.dtype)
        return start.scatter_reduce_(0, self.bins, values, which, include_self=False)


def _table(columns: Mapping[str, Tensor], present: Tensor, unknown: Tensor) -> pa.Table:
    """The bins that are present, without the teacher's statistics where they are unknown."""
    arrays = []
    for field in POSITIONS:
        mask = unknown[present].numpy() if field.name in _OF_TEACHER else None
        arrays.append(pa.array(columns[field.name][present].numpy(), mask=mask).cast(field.type))
    return pa.table(arrays, schema=POSITIONS)


def _fixed(values: Tensor) -> Tensor:
    """Float values as integers in units of UNIT; NaN is 0."""
    limited = values.double().nan_to_num(0.0).clamp(-LARGEST_IN_SUMS, LARGEST_IN_SUMS)
    return (limited / UNIT).round().long()


def histogram_table(step: int, tokens: TrainedTokens) -> pa.Table:
    """How many of one step's tokens lie in each cell of position and value; schema HISTOGRAM."""
    positions = position_bins(tokens.positions)
    block = (step - 1) // STEPS_PER_BLOCK * STEPS_PER_BLOCK + 1
    parts = []
    log_ratios = log_ratio(tokens.teacher_log_probs, tokens.student_log_probs)
    for quantity, values in (("log_ratio", log_ratios), ("reward", tokens.rewards)):
        cells = torch.bincount(
            positions * NUM_VALUES + value_bins(values), minlength=NUM_POSITIONS * NUM_VALUES
        )
        filled = cells.nonzero().flatten()
        columns = (
            np.full(len(filled), block),
            POSITION_STARTS[(filled // NUM_VALUES).numpy()],
            pa.repeat(quantity, len(filled)),
            (filled % NUM_VALUES).numpy(),
            cells[filled].numpy(),
        )
        arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, HISTOGRAM, strict=True)]
        parts.append(pa.table(arrays, schema=HISTOGRAM))
    return pa.concat_tables(parts)


def merge(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """One table of several, or of none: a row for each cell, in the order of the keys."""
    if not tables:
        return schema.empty_table()
    keys = [name for name in schema.names if name in _KEYS]
    ways = [(name, _way(name)) for name in schema.names if name not in _KEYS]
    grouped = pa.concat_tables(tables).group_by(keys, use_threads=False).aggregate(ways)
    columns = [grouped[name] for name in keys] + [grouped[f"{name}_{way}"] for name, way in ways]
    ordered = pa.table(columns, names=[*keys, *(name for name, _ in ways)])
    return ordered.select(schema.names).sort_by([(k, "ascending") for k in keys]).cast(schema)


def _way(name: str) -> str:
    return name[-3:] if name.endswith(("_min", "_max")) else "sum"
