"""Reward records: exact merging, quantiles, parts on disk, what training writes."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from rollout_cases import make_rollout
from torch import Tensor

from poweropd import Config, Trainer
from poweropd.data.rollout import Rollout
from poweropd.objectives.base import TokenRecord
from poweropd.runs.bins import (
    NUM_VALUES,
    POSITION_STARTS,
    VALUE_EDGES,
    position_bins,
    quantile,
    value_bins,
    value_ends,
)
from poweropd.runs.recorder import RewardRecorder, RewardRecords
from poweropd.runs.statistics import HISTOGRAM, POSITIONS, histogram_table, merge, position_table

MAKES = Callable[..., Config]


def tokens(n: int, seed: int = 0, longest: int = 600, spread: float = 5.0) -> TokenRecord:
    """Random trained tokens, every 7th without the teacher's statistics."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (-spread * torch.rand(n, generator=generator) ** 4 for _ in range(2))
    unknown = torch.where(torch.arange(n) % 7 == 0, torch.nan, 0.0)
    positions = torch.randint(longest, (n,), generator=generator)
    return TokenRecord(
        positions=positions,
        rewards=teacher.exp() ** 5 - student.exp() ** 5,
        student_log_probs=student,
        teacher_log_probs=teacher,
        entropy=torch.rand(n, generator=generator),
        top1=(torch.rand(n, generator=generator) > 0.3).float(),
        teacher_entropy=unknown + torch.rand(n, generator=generator),
        teacher_top1=unknown + (torch.rand(n, generator=generator) > 0.2),
        prompt_indices=torch.arange(n) % 4,
        sample_indices=torch.zeros(n, dtype=torch.long),
        sampler_log_ratios=torch.zeros(n),
        weights=torch.ones(n),
        tail=torch.full((n,), torch.nan),
        teacher_tail=torch.full((n,), torch.nan),
        span_sizes=torch.ones(n),
    )


def chosen(record: TokenRecord, index: Tensor) -> TokenRecord:
    return TokenRecord(*(vars(record)[f.name][index] for f in fields(record)))


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 300), seed=st.integers(0, 99))
def test_any_split_in_any_order_merges_to_the_same_bytes(
    data: st.DataObject, n: int, seed: int
) -> None:
    record = tokens(n, seed, spread=60.0)
    record.teacher_log_probs[0] = -torch.inf
    shards = data.draw(st.integers(1, 8))
    owners = torch.tensor(data.draw(st.lists(st.integers(0, shards - 1), min_size=n, max_size=n)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    parts = [chosen(record, order[owners[order] == k]) for k in range(shards)]
    for make, schema in ((position_table, POSITIONS), (histogram_table, HISTOGRAM)):
        whole = merge([make(3, record)], schema)
        merged = merge([make(3, part) for part in reversed(parts)], schema)
        assert parquet_bytes(merged) == parquet_bytes(whole)


def test_a_positions_row_is_what_numpy_says() -> None:
    record = tokens(5000)
    table = position_table(7, record)
    rows = {row["position"]: row for row in table.to_pylist()}
    assert sum(row["count"] for row in rows.values()) == 5000
    for start, end in ((3, 4), (POSITION_STARTS[40], POSITION_STARTS[41])):
        mask = ((record.positions >= start) & (record.positions < end)).numpy()
        row, reward = rows[int(start)], record.rewards.numpy()[mask].astype(np.float64)
        log_ratio = (record.teacher_log_probs - record.student_log_probs).numpy()[mask]
        assert row["step"] == 7
        assert row["count"] == mask.sum() == len(reward) > 0
        assert row["reward_sum"] * 2.0**-30 == pytest.approx(reward.sum(), abs=1e-6)
        assert row["reward_min"] == reward.min()
        assert row["log_ratio_max"] == log_ratio.max()
        known = mask & ~record.teacher_entropy.isnan().numpy()
        assert row["teacher_count"] == known.sum() < mask.sum()
        teacher_entropy = record.teacher_entropy.numpy()[known].sum()
        assert row["teacher_entropy_sum"] * 2.0**-30 == pytest.approx(teacher_entropy, rel=1e-5)
        both = known & (record.top1.numpy() > 0) & (record.teacher_top1.numpy() > 0)
        assert row["both_top1"] == both.sum()


def test_a_teacher_of_log_probs_alone_leaves_nulls() -> None:
    record = tokens(50)
    record = replace(record, teacher_entropy=torch.full((50,), torch.nan))
    table = merge([position_table(1, record)] * 2, POSITIONS)
    for name in ("teacher_entropy_sum", "teacher_top1", "both_top1"):
        assert table[name].null_count == len(table)
    assert table["top1"].null_count == 0


def test_bins_cover_every_value_and_position_once() -> None:
    low, high = value_ends()
    values = torch.cat([torch.tensor([-math.inf, math.inf, 0.0, -0.0]), torch.randn(999) * 30])
    for value, found in zip(values.tolist(), value_bins(values).tolist(), strict=True):
        if 0 < found < NUM_VALUES - 1:
            assert low[found] <= value < high[found]
        else:
            assert abs(value) >= VALUE_EDGES[-1]
    assert np.all(high[1:-1] - low[1:-1] <= np.maximum(0.19 * np.abs(high[1:-1]), 2.0**-13))
    positions = torch.arange(5000)
    starts = POSITION_STARTS[position_bins(positions)]
    assert np.all(starts <= positions.numpy())
    assert np.all(starts[:32] == np.arange(32))
    assert np.all(np.diff(POSITION_STARTS) > 0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=200),
    q=st.floats(0, 1),
)
def test_a_quantile_is_off_by_less_than_its_bin(values: list[float], q: float) -> None:
    array = np.array(values, dtype=np.float32)
    bins = value_bins(torch.from_numpy(array)).numpy()
    exact = np.sort(array)[max(0, math.ceil(q * len(array)) - 1)]
    found = quantile(np.bincount(bins, minlength=NUM_VALUES), q)
    low, high = value_ends()
    (place,) = value_bins(torch.tensor([exact])).tolist()
    assert low[place] <= found <= high[place]
    assert abs(found - exact) <= high[place] - low[place]


def rollout(prompt: int, ids: list[int]) -> Rollout:
    return make_rollout(prompt, [1, 2], ids, log_probs=[0.0] * len(ids))


def decode(ids: list[int]) -> str:
    return "".join(chr(97 + i) for i in ids)


def test_parts_end_at_writes_and_truncation_removes_whole_ones(tmp_path: Path) -> None:
    recorder = RewardRecorder(tmp_path / "rewards", decode)
    written = {}
    for step in range(1, 10):
        recorder.record(step, tokens(30, seed=step), [])
        if step % 3 == 0:
            recorder.write()
            written[step] = RewardRecords.read(recorder.folder)
    (recorder.folder / ".tmp-steps-00000010-00000012").mkdir()
    (recorder.folder / "notes.txt").touch()
    (recorder.folder / "figures").mkdir()
    recorder.truncate(6)
    assert {p.name for p in recorder.folder.iterdir()} == {
        "notes.txt",
        "figures",
        "steps-00000001-00000003",
        "steps-00000004-00000006",
    }
    assert RewardRecords.read(recorder.folder) == written[6] != written[9]
    assert recorder.take_seconds() > 0 == recorder.take_seconds()


def test_a_damaged_part_is_left_out_and_named(tmp_path: Path) -> None:
    recorder = RewardRecorder(tmp_path / "rewards", decode)
    for step in (1, 2):
        recorder.record(step, tokens(30, seed=step), [])
        recorder.write()
    path = recorder.folder / "steps-00000002-00000002" / "positions.parquet"
    path.write_bytes(path.read_bytes()[:50])
    found = RewardRecords.read(recorder.folder)
    assert found.unreadable == ["steps-00000002-00000002 (ArrowInvalid)"]
    assert set(found.positions["step"].to_pylist()) == {1}
    assert len(RewardRecords.read(tmp_path / "nowhere").positions) == 0


def test_kept_completions_show_each_trained_tokens_reward(tmp_path: Path) -> None:
    recorder = RewardRecorder(tmp_path / "rewards", decode)
    completions = [rollout(1, [3, 4, 5, 6]), rollout(0, [7])]
    assert recorder.wants(1, completions[0])
    assert not recorder.wants(2, completions[0])
    assert not recorder.wants(1, rollout(9, [3]))
    record = chosen(tokens(5), torch.arange(5))
    record = replace(
        record,
        prompt_indices=torch.tensor([2, 1, 1, 1, 0]),
        positions=torch.tensor([0, 0, 1, 3, 0]),
    )
    recorder.record(1, record, completions)
    recorder.write()
    first, second = RewardRecords.read(recorder.folder).completions.to_pylist()
    assert (first["prompt_index"], second["prompt_index"]) == (0, 1)
    assert second["pieces"] == ["d", "e", "f", "g"]
    assert second["prompt"] == "bc"
    rewards = record.rewards.tolist()
    assert second["rewards"] == [rewards[1], rewards[2], None, rewards[3]]
    assert first["rewards"] == [rewards[4]]


def test_a_run_records_every_trained_token_with_the_teachers_statistics(recipe: MAKES) -> None:
    config = recipe(**{"train.steps": 3, "checkpoint.every": 2})
    result = Trainer(config, progress=False).train()
    found = RewardRecords.read(result.run_dir / "rewards")
    for row in Trainer(config, progress=False).run.metrics():
        own = found.positions.filter(pa.compute.equal(found.positions["step"], row["step"]))
        total = pa.compute.sum(own["count"]).as_py()
        assert total == row["num_tokens"] == pa.compute.sum(own["teacher_count"]).as_py()
        mean = pa.compute.sum(own["reward_sum"]).as_py() * 2.0**-30 / total
        assert mean == pytest.approx(row["reward/mean"], abs=1e-7)
        assert pa.compute.min(own["reward_min"]).as_py() == row["reward/min"]
        assert pa.compute.sum(own["top1"]).as_py() > 0
        assert row["seconds/record"] > 0
    kept = found.completions.to_pylist()
    assert [(c["step"], c["prompt_index"]) for c in kept] == [(1, 0), (1, 1)]
    assert all(len(c["pieces"]) == len(c["ids"]) == c["length"] for c in kept)
    assert any(reward is not None for reward in kept[0]["rewards"])


def test_a_run_that_fails_keeps_the_steps_before(recipe: MAKES) -> None:
    config = recipe(**{"checkpoint.every": 100})
    trainer = Trainer(config, progress=False)
    step = trainer.step
    trainer.step = lambda number: step(number) if number < 2 else 1 / 0  # type: ignore
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    found = RewardRecords.read(Path(config.run.dir) / "rewards")
    assert set(found.positions["step"].to_pylist()) == {1, 2}
