"""The reward records of a run: statistics of every step, and a few completions.

They are in `rewards/` of the run directory. Each part is a directory of three parquet files about
consecutive steps, whole or absent. A part ends at every checkpoint, so resuming removes exactly the
parts after the checkpoint.
"""

import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from torch import Tensor

from poweropd.data.rollout import Rollout
from poweropd.objectives.base import TokenRecord
from poweropd.runs import statistics
from poweropd.runs.files import JsonObject, replaced_directory

STEPS_PER_PART = 100  # at most: a part also ends at a checkpoint, and when training ends
SAMPLE_EVERY = 50  # steps; completions of the first step are kept, too
SAMPLES = 2  # completions that are kept of a step
LONGEST_SAMPLE = 512  # tokens that are kept of a completion
CONTEXT = 4  # tokens before a token that decide how its text reads
NAME = re.compile(r"steps-(\d+)-(\d+)")

_FLOATS = pa.list_(pa.float32())
#: One row per kept completion. The lists have one entry per token, null where it was not trained.
COMPLETIONS = pa.schema(
    [
        *((name, pa.int32()) for name in ("step", "prompt_index", "sample_index", "length")),
        ("stopped", pa.bool_()),
        ("prompt", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("pieces", pa.list_(pa.string())),  # the text that each token adds
        *((name, _FLOATS) for name in ("rewards", "student_log_probs", "teacher_log_probs")),
    ]
)
NONE_KEPT = pa.Table.from_batches([], COMPLETIONS)  # empty_table() would load pandas
STATISTICS = {"positions": statistics.POSITIONS, "histogram": statistics.HISTOGRAM}
SCHEMAS = {**STATISTICS, "completions": COMPLETIONS}
Tables = dict[str, pa.Table]  # by the names of SCHEMAS


class RewardRecorder(AbstractContextManager["RewardRecorder"]):
    """Collects the statistics of steps and writes them in parts; `seconds` is the time it takes."""

    def __init__(self, folder: Path, decode: Callable[[list[int]], str]) -> None:
        self.folder, self.decode = folder, decode
        self.seconds = 0.0
        self._clear()

    def _clear(self) -> None:
        self._steps: list[int] = []
        self._parts: list[Tables] = []

    def wants(self, step: int, completion: Rollout) -> bool:
        """Tells whether this completion of step `step`, counted from 1, is to be kept."""
        prompt_index, sample_index = completion.key
        chosen = prompt_index < SAMPLES and sample_index == 0
        return chosen and (step == 1 or step % SAMPLE_EVERY == 0)

    def record(self, step: int, tokens: TokenRecord, completions: Sequence[Rollout]) -> None:
        """Adds step `step`, counted from 1, with all its tokens and the completions to keep."""
        start = time.perf_counter()
        self._steps.append(step)
        kept = sorted(completions, key=lambda c: c.key)
        rows = [_completion_row(step, completion, tokens, self.decode) for completion in kept]
        self._parts.append(
            {
                "positions": statistics.position_table(step, tokens),
                "histogram": statistics.histogram_table(step, tokens),
                "completions": pa.Table.from_pylist(rows, COMPLETIONS),
            }
        )
        self.seconds += time.perf_counter() - start
        if len(self._steps) >= STEPS_PER_PART:
            self.write()

    def write(self) -> None:
        """Writes what was recorded as one part."""
        if not self._steps:
            return
        start = time.perf_counter()
        name = f"steps-{self._steps[0]:08d}-{self._steps[-1]:08d}"
        with replaced_directory(self.folder / name) as temporary:
            for table, merged in _merged(self._parts).items():
                parquet.write_table(merged, temporary / f"{table}.parquet", compression="zstd")
        self._clear()
        self.seconds += time.perf_counter() - start

    def take_seconds(self) -> float:
        """Returns the seconds since the last call; writing a part counts to the step after it."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def truncate(self, steps: int) -> None:
        """Keeps the first `steps` optimizer steps, which end with a part or before the first."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            match = NAME.fullmatch(path.name)
            left_by_a_kill = path.name.startswith(".tmp-")
            if left_by_a_kill or (match is not None and int(match[2]) > steps):
                shutil.rmtree(path)

    def __exit__(self, *exception: object) -> None:
        """Writes what was recorded, however training ends."""
        self.write()


def _merged(parts: Sequence[Tables]) -> Tables:
    """Returns the tables of all parts as one of each; empty ones if there is no part."""
    tables = {name: [part[name] for part in parts] for name in SCHEMAS}
    merged = {name: statistics.merge(tables[name], SCHEMAS[name]) for name in STATISTICS}
    return merged | {"completions": pa.concat_tables([NONE_KEPT, *tables["completions"]])}


def _completion_row(
    step: int, completion: Rollout, tokens: TokenRecord, decode: Callable[[list[int]], str]
) -> JsonObject:
    ids = completion.completion_ids[:LONGEST_SAMPLE]
    prompt_index, sample_index = completion.key
    own = (tokens.prompt_indices == prompt_index) & (tokens.sample_indices == sample_index)
    positions = tokens.positions[own].tolist()

    def per_token(values: Tensor) -> list[float | None]:
        trained = dict(zip(positions, values[own].tolist(), strict=True))
        return [trained.get(position) for position in range(len(ids))]

    return {
        "step": step,
        "prompt_index": prompt_index,
        "sample_index": sample_index,
        "length": len(completion.completion_ids),
        "stopped": completion.stopped,
        "prompt": decode(completion.prompt_ids),
        "ids": ids,
        "pieces": [_piece(ids, i, decode) for i in range(len(ids))],
        "rewards": per_token(tokens.rewards),
        "student_log_probs": per_token(tokens.student_log_probs),
        "teacher_log_probs": per_token(tokens.teacher_log_probs),
    }


def _piece(ids: list[int], index: int, decode: Callable[[list[int]], str]) -> str:
    """Returns the text that a token adds to those before it."""
    start = max(0, index - CONTEXT)
    before, whole = decode(ids[start:index]), decode(ids[start : index + 1])
    return whole[len(before) :] if whole.startswith(before) else decode(ids[index : index + 1])


@dataclass(frozen=True)
class RewardRecords:
    """Everything that a run has recorded, merged over its parts."""

    positions: pa.Table
    histogram: pa.Table
    completions: pa.Table
    unreadable: list[str]  # damaged parts, which are left out

    @classmethod
    def read(cls, folder: Path) -> "RewardRecords":
        """Reads the parts in a folder; the tables are empty if there is none."""
        parts, unreadable = list[Tables](), list[str]()
        for path in sorted(p for p in folder.glob("*") if NAME.fullmatch(p.name)):
            files = {name: path / f"{name}.parquet" for name in SCHEMAS}
            try:
                parts.append({n: parquet.read_table(files[n], schema=SCHEMAS[n]) for n in SCHEMAS})
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                unreadable.append(f"{path.name} ({type(error).__name__})")
        return cls(**_merged(parts), unreadable=unreadable)
