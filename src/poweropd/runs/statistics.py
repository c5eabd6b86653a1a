"""Reward statistics of trained tokens as tables that merge exactly.

Counts and sums are integers (sums in units of 2^-30), minima and maxima are floats: merging in any
order and any grouping gives the same bits.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from poweropd.objectives.base import TokenRecord
from poweropd.runs.bins import NUM_POSITIONS, NUM_VALUES, POSITION_STARTS, position_bins, value_bins

UNIT = 2.0**-30  # the unit of all sums
LARGEST_IN_SUMS = 2.0**16  # a larger magnitude, such as that of minus infinity, counts as this
STEPS_PER_BLOCK = 10  # one histogram for so many steps; one for each step would be large

#: One row per optimizer step (from 1) and bin of positions, named by its first position.
#: `top1` counts the tokens that the student finds most probable. `teacher_*` and `both_top1` are
#: about `teacher_count` tokens, and null where the teacher gave log-probabilities alone.
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


def position_table(step: int, tokens: TokenRecord) -> pa.Table:
    """Returns statistics of one step's tokens by completion position, with schema POSITIONS."""
    known = ~tokens.teacher_entropy.isnan()
    log_ratios = tokens.log_ratios
    top1, teacher_top1 = tokens.top1 > 0, known & (tokens.teacher_top1 > 0)
    columns = {
        "step": torch.full_like(known, step, dtype=torch.int32),
        "position": torch.from_numpy(POSITION_STARTS)[position_bins(tokens.positions)],
        "count": torch.ones_like(known),
        "reward_sum": _fixed(tokens.rewards),
        "log_ratio_sum": _fixed(log_ratios),
        "entropy_sum": _fixed(tokens.entropy),
        **{f"reward_{end}": tokens.rewards for end in ("min", "max")},
        **{f"log_ratio_{end}": log_ratios for end in ("min", "max")},
        "top1": top1,
        "teacher_count": known,
        "teacher_entropy_sum": _fixed(tokens.teacher_entropy),
        "teacher_top1": teacher_top1,
        "both_top1": top1 & teacher_top1,
    }
    arrays = []
    for field in POSITIONS:
        unknown = ~known.numpy() if field.name in _OF_TEACHER else None
        arrays.append(pa.array(columns[field.name].numpy(), mask=unknown).cast(field.type))
    return merge([pa.table(arrays, schema=POSITIONS)], POSITIONS)


def _fixed(values: Tensor) -> Tensor:
    """Returns float values as integers in units of UNIT; NaN becomes 0."""
    limited = values.double().nan_to_num(0.0).clamp(-LARGEST_IN_SUMS, LARGEST_IN_SUMS)
    return (limited / UNIT).round().long()


def histogram_table(step: int, tokens: TokenRecord) -> pa.Table:
    """Counts one step's tokens in each cell of position and value, with schema HISTOGRAM."""
    positions = position_bins(tokens.positions)
    ratios = tokens.log_ratios
    block = (step - 1) // STEPS_PER_BLOCK * STEPS_PER_BLOCK + 1
    parts = []
    for quantity, values in (("log_ratio", ratios), ("reward", tokens.rewards)):
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
    """Merges any number of tables into one: a row for each cell, in the order of the keys."""
    if not tables:
        return pa.Table.from_batches([], schema)  # empty_table() would load pandas
    keys = [name for name in schema.names if name in _KEYS]
    return totals(pa.concat_tables(tables), keys).select(schema.names).cast(schema)


def totals(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Returns one row for each value of the keys, in their order.

    A column whose name ends in _min or _max keeps its extreme; every other one is added up.
    """
    names = [name for name in table.column_names if name not in keys]
    ways = [name[-3:] if name.endswith(("_min", "_max")) else "sum" for name in names]
    pairs = list(zip(names, ways, strict=True))
    found = table.group_by(list(keys), use_threads=False).aggregate(pairs)
    columns = [found[key] for key in keys] + [found[f"{name}_{way}"] for name, way in pairs]
    return pa.table(columns, names=[*keys, *names]).sort_by([(k, "ascending") for k in keys])
