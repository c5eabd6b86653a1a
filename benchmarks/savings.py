"""What a sampled update saves against full-vocabulary ones: measured, beside what `plan` predicts.

    python benchmarks/savings.py --geometry small --repeats 3 --json savings.json

    sampled      our update from sampled tokens
    full_vocab   ours from both models' whole distributions, by chunks: the reverse KL
    naive        the same loss by autograd from logits of both models, [B, T, V] in float32

Each path runs in its own process. `predicted` is the memory of `poweropd.plan.memory` above the
weights, tensors only; the C library's heap keeps holes between them, and `without holes` is the
peak of one more run in which every tensor of 64 KiB or more is returned as soon as it is freed.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from common import (
    CUDA,
    GEOMETRIES,
    LENGTHS,
    Cost,
    Geometry,
    Model,
    Pair,
    apart,
    machine,
    measure,
    print_table,
    update_full_vocab,
    update_sampled,
)
from update import Padded

from poweropd import rewards
from poweropd.models import flops
from poweropd.models.devices import torch_dtype
from poweropd.models.geometry import Geometry as Shape
from poweropd.plan import memory

REWARD = rewards.create("log_ratio")  # its divergence is the reverse KL
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # read by glibc when a process starts
Update = Callable[[], None]


def naive(pair: Pair) -> Update:
    """Full-vocabulary reverse KL from whole log-softmaxes, completions padded to the cap."""

    def update() -> None:
        batch = Padded.of(pair, pair.geometry.completion)
        with torch.no_grad():
            teacher = batch.whole_log_softmax(pair.teacher)
        student = batch.whole_log_softmax(pair.student)
        divergence = (student.exp() * (student - teacher)).sum(-1)
        ((divergence * batch.trained).sum() / pair.num_tokens).backward()
        pair.finish()

    return update


PATHS: dict[str, Callable[[Pair], Update]] = {
    "sampled": lambda pair: lambda: update_sampled(pair, REWARD),
    "full_vocab": lambda pair: lambda: update_full_vocab(pair, REWARD),
    "naive": naive,
}


def run(path: str, geometry: Geometry, lengths: str, updates: int) -> Cost:
    return measure(PATHS[path](Pair.build(geometry, lengths)), updates)


def shape(model: Model, vocab: int) -> Shape:
    return Shape(
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        mlp=model.mlp,
        vocab=vocab,
        tied=True,
    )


def predicted(geometry: Geometry, path: str, lengths: str) -> memory.Memory:
    """Memory of a step of `path`, which has no rollouts here."""
    compute = torch_dtype(geometry.dtype).itemsize
    setup = memory.Setup(
        completions=geometry.batch,
        prompt=geometry.prompt,
        completion=geometry.completion,
        max_tokens=geometry.max_tokens,
        teacher_max_tokens=geometry.max_tokens,
        compute=compute,
        master=memory.FLOAT32,
        teacher=compute,
        reads_along=path == "full_vocab",
        padded=lengths != "fixed",
        device="cuda" if CUDA else "cpu",
    )
    student, teacher = (shape(m, geometry.vocab) for m in (geometry.student, geometry.teacher))
    return memory.of_step(student, teacher, setup)


def above_weights(step: memory.Memory) -> int:
    """The peak of scoring and update above the two models."""
    weights = sum(p.bytes for p in step.parts if p.name in ("student weights", "teacher weights"))
    copy = sum(p.bytes for p in step.parts if p.name == "their copy for rollouts")
    return max(step.held("score"), step.held("update")) - weights - copy


def update_flops(geometry: Geometry, lengths: str) -> float:
    student, teacher = (shape(m, geometry.vocab) for m in (geometry.student, geometry.teacher))
    sequences = [(geometry.prompt + n, n) for n in geometry.lengths(lengths)]
    return flops.update(student, teacher, sequences).total


def without_holes(arguments: argparse.Namespace, path: str, geometry: Geometry) -> int:
    os.environ.update(NO_HOLES)
    try:
        found = apart(arguments.threads, run, path, geometry, arguments.lengths, 1)
    finally:
        for name in NO_HOLES:
            del os.environ[name]
    return found.peak_bytes


def row(path: str, cost: Cost, holes: int, first: Cost, expected: int | None) -> list[str]:
    cells = [f"{cost.cpu_seconds:.2f}", f"{cost.wall_seconds:.2f}"]
    cells += [f"{cost.peak_bytes / 1e9:.2f}", f"{holes / 1e9:.2f}"]
    if expected is None:
        cells += ["", ""]
    else:
        cells += [f"{expected / 1e9:.2f}", f"{expected / holes - 1:+.0%}"]
    ratios = (cost.cpu_seconds / first.cpu_seconds, cost.peak_bytes / first.peak_bytes)
    return [path, *cells, *(f"{ratio:.2f}" for ratio in ratios)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--lengths", choices=LENGTHS, default="fixed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=1, help="timed ones in each process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    geometry, lengths = GEOMETRIES[arguments.geometry], arguments.lengths
    print(f"{machine()}, {arguments.threads} threads; {arguments.geometry}, {lengths}")
    costs: dict[str, list[Cost]] = {path: [] for path in PATHS}
    for _ in range(arguments.repeats):
        for path, found in costs.items():
            found.append(apart(arguments.threads, run, path, geometry, lengths, arguments.updates))
    medians = {path: Cost.median(found) for path, found in costs.items()}
    holes = {path: without_holes(arguments, path, geometry) for path in PATHS}
    expected = {
        path: above_weights(predicted(geometry, path, lengths)) for path in PATHS if path != "naive"
    }
    total = update_flops(geometry, lengths)
    print(f"{total / 1e12:.3g} TFLOP in each: both heads run in full, whatever the objective\n")
    header = ["path", "CPU s", "wall s", "peak GB", "without holes", "predicted", "off"]
    rows = [
        row(path, medians[path], holes[path], medians["sampled"], expected.get(path))
        for path in PATHS
    ]
    print_table([*header, "CPU / sampled", "peak / sampled"], rows)
    if arguments.json:
        paths = {
            path: asdict(medians[path])
            | {"peak_bytes_without_holes": holes[path], "predicted_bytes": expected.get(path)}
            for path in PATHS
        }
        found_all = {"machine": machine(), "flops": total, "paths": paths}
        arguments.json.write_text(json.dumps(found_all, indent=2) + "\n")


if __name__ == "__main__":
    main()
