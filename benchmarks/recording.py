"""What recording rewards costs, as a share of a step, and what it leaves on disk.

    python benchmarks/recording.py [--threads 1] [--geometry small] [--steps 20]

A step here is scoring and update of ragged completions; sampling them, the longest part of a real
step, is left out, so the shares are upper bounds. Recording and the step alternate. The teacher's
entropy and top-1, which its scoring gives along, are timed by the same scoring without them.
The last row is a run of 1,500 steps of 32 completions of up to 1,024 tokens: 100 steps are
recorded, and their part's size is scaled.
"""

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from common import (
    DEVICE,
    GEOMETRIES,
    Geometry,
    Pair,
    apart,
    machine,
    print_table,
    ragged,
    score,
    seconds_of,
    update_sampled,
)

from poweropd import rewards
from poweropd.data.batch import pack, teacher_sequences
from poweropd.kernels import score_tokens
from poweropd.objectives.base import TokenRecord
from poweropd.runs.recorder import RewardRecorder

RUN_STEPS, PART_STEPS = 1500, 100


@dataclass(frozen=True)
class Costs:
    """Seconds of one step, medians."""

    step: float
    record: float
    write: float  # of a part of 100 steps, per step
    teacher: float  # of the teacher's statistics; noise can make it negative


def random_record(lengths: list[int], seed: int) -> TokenRecord:
    """Tokens of completions of these lengths: log-probs like a trained pair's."""
    torch.manual_seed(seed)
    n = sum(lengths)
    student = -12 * torch.rand(n) ** 6
    teacher = (student + torch.randn(n) * student.abs().sqrt()).clamp(max=0.0)
    counts = torch.tensor(lengths)
    return TokenRecord(
        positions=torch.cat([torch.arange(length) for length in lengths]),
        rewards=rewards.create("power")(teacher, student),
        student_log_probs=student,
        teacher_log_probs=teacher,
        entropy=torch.rand(n),
        top1=(torch.rand(n) > 0.3).float(),
        teacher_entropy=torch.rand(n),
        teacher_top1=(torch.rand(n) > 0.2).float(),
        prompt_indices=torch.arange(len(lengths)).repeat_interleave(counts),
        sample_indices=torch.zeros(n, dtype=torch.long),
        sampler_log_ratios=torch.zeros(n),
        weights=torch.ones(n),
        span_sizes=torch.ones(n),
    )


def decode(ids: list[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


def costs(geometry: Geometry, steps: int, folder: Path) -> Costs:
    """Times steps, recording, and both kinds of scoring, in turns."""
    pair, reward = Pair.build(geometry, "ragged"), rewards.create("power")
    lengths = geometry.lengths("ragged")
    recorder = RewardRecorder(folder / "rewards", decode)
    timed: list[tuple[float, float, float]] = []
    update_sampled(pair, reward)
    score_plain(pair)
    for step in range(1, steps + 1):
        record = random_record(lengths, step)
        completions = [e.rollout for e in pair.examples if recorder.wants(step, e.rollout)]
        whole = seconds_of(lambda: update_sampled(pair, reward))
        recording = seconds_of(lambda: recorder.record(step, record, completions))  # noqa: B023
        with_statistics = seconds_of(lambda: score(pair))
        timed.append((whole, recording, with_statistics - seconds_of(lambda: score_plain(pair))))
    step_, record_, teacher = (statistics.median(column) for column in zip(*timed, strict=True))
    for step in range(steps + 1, PART_STEPS):
        recorder.record(step, random_record(lengths, step), [])
    return Costs(step_, record_, seconds_of(recorder.write) / PART_STEPS, teacher)


def score_plain(pair: Pair) -> None:
    """The teacher's log-probabilities alone."""
    examples, teacher = pair.examples, pair.teacher
    with torch.inference_mode():
        for group in pack([e.teacher_length for e in examples], pair.geometry.max_tokens):
            sequences = teacher_sequences([examples[i] for i in group]).to(DEVICE)
            hidden_states = teacher.hidden_states(sequences)
            scored = score_tokens(hidden_states, teacher.head(), sequences.targets, entropy=False)
            scored.log_probs.cpu()


def size_of_a_run(folder: Path) -> tuple[int, float, float]:
    """Bytes of 1,500 steps of the paper's size, seconds of recording one of them, of writing."""
    recorder, timed = RewardRecorder(folder / "rewards", decode), []
    for step in range(1, PART_STEPS):
        record = random_record(ragged(32, 1024), step)
        timed.append(seconds_of(lambda: recorder.record(step, record, [])))  # noqa: B023
    write = seconds_of(recorder.write) / PART_STEPS
    written = sum(p.stat().st_size for p in recorder.folder.rglob("*.parquet"))
    return written * RUN_STEPS // (PART_STEPS - 1), statistics.median(timed), write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    geometry = GEOMETRIES[arguments.geometry]
    with tempfile.TemporaryDirectory() as folder:
        found = apart(arguments.threads, costs, geometry, arguments.steps, Path(folder) / "a")
        written, record, write = apart(arguments.threads, size_of_a_run, Path(folder) / "b")
    print(f"{machine()}, {arguments.threads} thread, geometry {arguments.geometry}")
    rows = [("scoring and update", found.step), ("record", found.record)]
    rows += [("write (a part's, per step)", found.write)]
    rows += [("teacher's entropy and top-1", found.teacher)]
    shares = [[name, f"{1e3 * s:.2f}", f"{s / found.step:.2%}"] for name, s in rows]
    print_table(["", "ms per step", "of a step"], shares)
    print(
        f"32 completions of up to 1,024 tokens: {1e3 * record:.1f} ms to record, "
        f"{1e3 * write:.1f} ms to write a step, {written / 1e6:.1f} MB for {RUN_STEPS:,} steps"
    )


if __name__ == "__main__":
    main()
