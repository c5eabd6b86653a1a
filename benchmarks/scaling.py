"""How our update's cost grows: with vocabulary, length, batch, model and alpha, and its memory.

    python benchmarks/scaling.py --threads 1 [--tables phases,vocabulary,length,batch,...]

Starts from the geometry `small` of update.py and changes one thing at a time; each row has a
process of its own. `phases` says where the time of one update goes; `alpha` is about the head
alone, `memory` about a narrow pair, whose own memory does not hide that of the vocabulary.
"""

import argparse
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from common import (
    DEVICE,
    GEOMETRIES,
    Cost,
    Geometry,
    Memory,
    Model,
    Pair,
    apart,
    machine,
    measure,
    print_table,
    seconds_of,
    update_sampled,
)
from torch import Tensor

from poweropd import rewards
from poweropd.data.batch import Batch, collate, pack
from poweropd.kernels import Head, linear_log_prob, linear_policy_gradient, reference
from poweropd.objectives.sampled import Sampled

T = TypeVar("T")
Row = dict[str, Any]
REWARD = rewards.create("log_ratio")
ALPHAS = (0.5, 1.0, 5.0, 50.0, 500.0)
# The gain of the student's final norm. It multiplies the logits, which for random weights makes
# about one sampled token in nine more probable than 0.81, where a power of 500 is not zero yet.
SHARPNESS = 16.0
BODY = Model.of_width(128, 2)
NARROW = replace(GEOMETRIES["small"], student=BODY, teacher=BODY)


def update_cost(geometry: Geometry) -> Cost:
    pair = Pair.build(geometry, "fixed")
    return measure(lambda: update_sampled(pair, REWARD))


def update_peak(geometry: Geometry) -> int:
    """Bytes above the start of one first update."""
    pair = Pair.build(geometry, "fixed")
    memory = Memory()
    update_sampled(pair, REWARD)
    return memory.peak_bytes()


def vocabularies(base: Geometry) -> Iterable[tuple[str, Geometry]]:
    return ((f"V = {v}", replace(base, vocab=v)) for v in _around(base.vocab))


def completions(base: Geometry) -> Iterable[tuple[str, Geometry]]:
    return ((f"T = {t}", replace(base, completion=t)) for t in _around(base.completion))


def batches(base: Geometry) -> Iterable[tuple[str, Geometry]]:
    return ((f"B = {b}", replace(base, batch=b)) for b in _around(base.batch))


def models(base: Geometry) -> Iterable[tuple[str, Geometry]]:
    pairs = (((128, 2), (256, 3)), ((256, 4), (512, 6)), ((384, 6), (768, 8)))
    return (
        (
            f"{student[0]} x {student[1]} from {teacher[0]} x {teacher[1]}",
            replace(base, student=Model.of_width(*student), teacher=Model.of_width(*teacher)),
        )
        for student, teacher in pairs
    )


def _around(value: int) -> tuple[int, ...]:
    return (value // 2, value, 2 * value)


SWEEPS: dict[str, Callable[[Geometry], Iterable[tuple[str, Geometry]]]] = {
    "vocabulary": vocabularies,
    "length": completions,
    "batch": batches,
    "model": models,
}


def sweep(name: str, base: Geometry, threads: int) -> list[Row]:
    """The cost of an update, row by row."""
    rows = []
    for label, geometry in SWEEPS[name](base):
        cost = apart(threads, update_cost, geometry)
        tokens = geometry.batch * geometry.completion
        rows.append({
            name: label,
            "trained tokens": tokens,
            "CPU s": round(cost.cpu_seconds, 2),
            "wall s": round(cost.wall_seconds, 2),
            "CPU ms / token": round(1e3 * cost.cpu_seconds / tokens, 3),
            "peak MB": round(cost.peak_bytes / 1e6),
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class SharpPair:
    """What the head sees of a pair with random weights but near-certain tokens."""

    hidden: Tensor  # [N, H] of the student
    weight: Tensor  # [V, H]
    targets: Tensor  # [N] drawn from the student
    teacher_log_probs: Tensor  # [N]

    @classmethod
    @torch.no_grad()
    def build(cls, geometry: Geometry) -> "SharpPair":
        """The teacher is the student with noise of a tenth of its hidden states' size."""
        pair = Pair.build(geometry, "fixed")
        pair.student.causal_lm.base_model.norm.weight.fill_(SHARPNESS)
        hidden = pair.student.hidden_states(collate(pair.examples).to(DEVICE).student)
        weight = pair.student.head().weight.clone()
        noise = 0.1 * SHARPNESS * torch.randn_like(hidden)
        targets, scores = [], []
        for own, other in zip(hidden.split(256), (hidden + noise).split(256), strict=True):
            targets.append((own @ weight.T).softmax(-1).multinomial(1).squeeze(1))
            scores.append(reference.log_prob(other, Head(weight), targets[-1]))
        return cls(hidden, weight, torch.cat(targets), torch.cat(scores))

    def rewards(self, alpha: float, student_log_probs: Tensor, tokens: slice) -> Tensor:
        return rewards.create("power", alpha=alpha)(
            self.teacher_log_probs[tokens], student_log_probs
        )

    def loss(self, alpha: float, hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_gradient(
            hidden, weight, self.targets, lambda p, tokens: self.rewards(alpha, p, tokens)
        )

    def gradients(self, loss_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        """By the hidden states and by the weight."""
        inputs = [t.clone().requires_grad_() for t in (self.hidden, self.weight)]
        return torch.autograd.grad(loss_of(*inputs), inputs)


def head_costs(geometry: Geometry, repeats: int = 3) -> list[Row]:
    """By alpha: zero rewards, the head's backward, and how far its gradient is from autograd's."""
    sharp = SharpPair.build(geometry)
    log_probs = reference.log_prob(sharp.hidden, Head(sharp.weight), sharp.targets)
    found = {alpha: head_seconds(sharp, alpha, repeats) for alpha in ALPHAS}
    rows = []
    for alpha, (forward, both) in found.items():
        zero = (sharp.rewards(alpha, log_probs, slice(None)) == 0).float().mean().item()
        base_forward, base_both = found[1.0]
        rows.append({
            "alpha": alpha,
            "rewards that are 0": f"{zero:.1%}",
            "head forward s": round(forward, 3),
            "backward s": round(both - forward, 3),
            "/ alpha 1": round((both - forward) / (base_both - base_forward), 2),
            "error to autograd": f"{gradient_error(sharp, alpha):.1e}",
        })  # fmt: skip
    return rows


def head_seconds(sharp: SharpPair, alpha: float, repeats: int) -> tuple[float, float]:
    """Seconds of the head's forward alone, and with its gradient."""

    def forward() -> None:
        with torch.no_grad():
            sharp.loss(alpha, sharp.hidden, sharp.weight)

    def both() -> None:
        sharp.gradients(lambda hidden, weight: sharp.loss(alpha, hidden, weight))

    both()
    timed = [(seconds_of(forward), seconds_of(both)) for _ in range(repeats)]
    first, second = (statistics.median(column) for column in zip(*timed, strict=True))
    return first, second


def gradient_error(sharp: SharpPair, alpha: float) -> float:
    """The larger relative distance of both gradients, of some tokens, to autograd's.

    Autograd is given the same rewards, since a power of 500 of its own log-probabilities would
    show their rounding and not that of the gradient.
    """
    some = slice(0, 256)
    part = replace(
        sharp,
        hidden=sharp.hidden[some],
        targets=sharp.targets[some],
        teacher_log_probs=sharp.teacher_log_probs[some],
    )
    log_probs = linear_log_prob(part.hidden, part.weight, part.targets)
    given = part.rewards(alpha, log_probs, slice(None))
    ours = part.gradients(lambda hidden, weight: part.loss(alpha, hidden, weight))
    theirs = part.gradients(
        lambda hidden, weight: reference.policy_gradient(
            hidden, Head(weight), part.targets, lambda _: given
        )
    )
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def alpha_table(base: Geometry, threads: int) -> list[Row]:
    return apart(threads, head_costs, base)


@contextmanager
def without_holes() -> Iterator[None]:
    """Lets processes started within hold what lives, and no more, where the C library is glibc's.

    Each block of 64 KiB or more is mapped, and unmapped, on its own. Without this the resident set
    counts holes in the heap, which vary with everything.
    """
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(2**16)
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})


def line_through(tokens: Sequence[int], peaks: Sequence[int]) -> tuple[float, float]:
    """Bytes of a further token, and of none, by least squares."""
    slope, start = statistics.linear_regression(tokens, peaks)
    return slope, start


@without_holes()
def memory_table(base: Geometry, threads: int) -> list[Row]:
    """Peak bytes against tokens at several vocabularies, and the line through them."""
    # One micro-batch: a budget would bound the memory of the bodies.
    narrow = replace(base, student=BODY, teacher=BODY, max_tokens=2**20)
    # So many that AdamW's own temporaries, which do not depend on them, are not the peak.
    tokens = [base.completion * b for b in (16, 32, 64)]
    rows = []
    for vocab in _around(base.vocab):
        peaks = [
            apart(threads, update_peak, replace(narrow, vocab=vocab, batch=n // base.completion))
            for n in tokens
        ]
        slope, start = line_through(tokens, peaks)
        residual = max(abs(y - start - slope * x) for x, y in zip(tokens, peaks, strict=True))
        rows.append({
            "vocabulary": f"V = {vocab}",
            **{f"{n} tokens, MB": round(peak / 1e6) for n, peak in zip(tokens, peaks, strict=True)},
            "slope, kB / token": round(slope / 1e3, 1),
            "farthest from the line, MB": round(residual / 1e6, 1),
            "at 0 tokens, MB": round(start / 1e6),
            "head's weight, MB": round(4 * vocab * BODY.hidden / 1e6),
            "one token's logits, kB": round(4 * vocab / 1e3),
        })  # fmt: skip
    return rows


class Phases:
    """One update of ours, phase by phase."""

    def __init__(self, geometry: Geometry) -> None:
        self.pair = Pair.build(geometry, "fixed")
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def timed(self, phase: str, call: Callable[[], T]) -> T:
        results: list[T] = []
        self.seconds[phase].append(seconds_of(lambda: results.append(call())))
        return results[0]

    def update(self) -> dict[str, float]:
        """Seconds of each phase."""
        self.seconds.clear()
        pair, examples = self.pair, self.pair.examples
        groups = pack([e.student_length for e in examples], pair.geometry.max_tokens)
        for batch in [collate([examples[i] for i in group]).to(DEVICE) for group in groups]:
            self._accumulate(batch)
        self.timed("clipping and AdamW", pair.finish)
        return {phase: sum(parts) for phase, parts in self.seconds.items()}

    def _accumulate(self, batch: Batch) -> None:
        student, teacher = self.pair.student, self.pair.teacher
        with torch.inference_mode():
            hidden = self.timed("teacher body", lambda: teacher.hidden_states(batch.teacher))
            scores = self.timed(
                "teacher head",
                lambda: linear_log_prob(hidden, teacher.head().weight, batch.teacher.targets),
            )
        scored = replace(batch, teacher_log_probs=scores.clone())
        objective, token_weight = Sampled(), 1 / self.pair.num_tokens
        hidden = self.timed("student body, forward", lambda: student.hidden_states(batch.student))
        loss, _ = self.timed(
            "student head, both ways",
            lambda: objective(hidden, student.head(), scored, REWARD, token_weight),
        )
        self.timed("student body, backward", loss.backward)


def phase_flops(geometry: Geometry) -> dict[str, float]:
    """Operations of the matmuls of each phase."""
    tokens = geometry.batch * geometry.completion
    student, teacher = (
        geometry.batch * model.body_flops(geometry.prompt + geometry.completion)
        for model in (geometry.student, geometry.teacher)
    )
    head = 2 * tokens * geometry.vocab
    return {
        "teacher body": teacher,
        "teacher head": head * geometry.teacher.hidden,
        "student body, forward": student,
        "student head, both ways": 3 * head * geometry.student.hidden,
        "student body, backward": 2 * student,
        "clipping and AdamW": 0.0,
    }


def phase_seconds(geometry: Geometry, repeats: int = 3) -> dict[str, float]:
    phases = Phases(geometry)
    phases.update()
    timed = [phases.update() for _ in range(repeats)]
    return {phase: statistics.median(t[phase] for t in timed) for phase in timed[0]}


def phase_table(base: Geometry, threads: int) -> list[Row]:
    """Where the time goes, and how fast the matmuls of each phase would have to be alone."""
    seconds = apart(threads, phase_seconds, base)
    flops = phase_flops(base)
    seconds, flops = (d | {"sum": sum(d.values())} for d in (seconds, flops))
    return [
        {
            "phase": phase,
            "GFLOP": round(flops[phase] / 1e9, 1),
            "s": round(spent, 3),
            "share": f"{spent / seconds['sum']:.0%}",
            "GFLOP / s": round(flops[phase] / spent / 1e9, 1),
        }
        for phase, spent in seconds.items()
    ]


TABLES: dict[str, Callable[[Geometry, int], list[Row]]] = {
    "phases": phase_table,
    **{name: partial(sweep, name) for name in SWEEPS},
    "alpha": alpha_table,
    "memory": memory_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    names = arguments.tables.split(",")
    if not set(names) <= set(TABLES):
        parser.error(f"--tables: expected some of {','.join(TABLES)}, got {arguments.tables!r}")
    print(f"{machine()}, {arguments.threads} threads, from the geometry {arguments.geometry}")
    found = {}
    for name in names:
        found[name] = TABLES[name](GEOMETRIES[arguments.geometry], arguments.threads)
        print()
        print_table(list(found[name][0]), [list(map(str, row.values())) for row in found[name]])
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "tables": found}, indent=2))


if __name__ == "__main__":
    main()
