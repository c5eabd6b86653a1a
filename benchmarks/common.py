"""What the benchmarks of the update share: geometries, data, our update, and how it is measured.

Needs torch and transformers and `poweropd`; models have random weights, made in memory.
"""

import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from poweropd import rewards
from poweropd.data.batch import collate, pack
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Example, Request
from poweropd.models.devices import torch_dtype
from poweropd.models.language_model import Student, Teacher
from poweropd.objectives.base import Objective
from poweropd.objectives.full_vocab import FullVocab
from poweropd.objectives.sampled import Sampled
from poweropd.teachers import base as teachers
from poweropd.teachers.local import LocalTeacher

T = TypeVar("T")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MEAN_RAGGED_SHARE = 157 / 256  # mean length of a ragged completion, as a share of the cap


@dataclass(frozen=True)
class Model:
    """The shape of a Qwen3 with a tied head."""

    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of_width(cls, hidden: int, layers: int) -> "Model":
        """Heads of 64, two to each key and value, and an MLP of three times the width."""
        return cls(hidden, layers, 3 * hidden, hidden // 64, max(1, hidden // 128), 64)

    def build(self, vocab: int, dtype: torch.dtype) -> Qwen3ForCausalLM:
        config = Qwen3Config(
            vocab_size=vocab,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.device(DEVICE):
            return Qwen3ForCausalLM(config).to(dtype)

    def body_flops(self, length: int) -> float:
        """Of one forward of one sequence without the head; causal attention counts half."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = 4 * length * self.hidden * (query + key_value)
        attention = 2 * length**2 * query
        return self.layers * (projections + attention + 6 * length * self.hidden * self.mlp)


@dataclass(frozen=True)
class Geometry:
    """A pair of models and the shape of a step."""

    student: Model
    teacher: Model
    vocab: int
    batch: int
    prompt: int
    completion: int  # the cap
    max_tokens: int  # of a micro-batch of ours, padding included
    dtype: str = "float32"  # of computing; master weights are float32

    def lengths(self, kind: str) -> list[int]:
        """Of the completions: all at the cap, or drawn from a fixed seed."""
        return LENGTHS[kind](self.batch, self.completion)


def ragged(batch: int, cap: int) -> list[int]:
    """One draw from each of `batch` equal parts of a range around the mean, in random order."""
    uniform = random.Random(0)
    mean = MEAN_RAGGED_SHARE * cap
    low, width = 2 * mean - cap, 2 * (cap - mean)
    drawn = [round(low + width * (i + uniform.random()) / batch) for i in range(batch)]
    uniform.shuffle(drawn)
    return drawn


LENGTHS: dict[str, Callable[[int, int], list[int]]] = {
    "fixed": lambda batch, cap: [cap] * batch,
    "ragged": ragged,
}
# `max_tokens` of the small ones is the share of a step that the product's default, 16,384, has of
# the paper's 32 completions: a bit less than a half.
GEOMETRIES = {
    "tiny": Geometry(
        Model.of_width(64, 1), Model.of_width(128, 1), vocab=512, batch=4, prompt=8,
        completion=24, max_tokens=64,
    ),
    "small": Geometry(
        Model.of_width(256, 4), Model.of_width(512, 6), vocab=2**15, batch=8, prompt=64,
        completion=256, max_tokens=1024,
    ),
    "qwen3-0.6b-from-4b": Geometry(
        Model(1024, 28, 3072, 16, 8, 128), Model(2560, 36, 9728, 32, 8, 128), vocab=151_936,
        batch=32, prompt=128, completion=1024, dtype="bfloat16", max_tokens=2**14,
    ),
}  # fmt: skip


@dataclass
class Pair:
    """Both models, the optimizer of the student, and the examples of one step."""

    geometry: Geometry
    student: Student
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    examples: list[Example]

    @classmethod
    def build(cls, geometry: Geometry, lengths: str) -> "Pair":
        torch.manual_seed(0)
        dtype = torch_dtype(geometry.dtype)
        student = Student(
            geometry.student.build(geometry.vocab, torch.float32), geometry.vocab, dtype
        )
        teacher = Teacher(geometry.teacher.build(geometry.vocab, dtype), geometry.vocab, dtype)
        optimizer = torch.optim.AdamW(student.parameters(), lr=5e-7, weight_decay=0.0, fused=True)
        examples = make_examples(geometry, geometry.lengths(lengths))
        return cls(geometry, student, teacher, optimizer, examples)

    @property
    def num_tokens(self) -> int:
        """Trained tokens of the step."""
        return sum(e.num_tokens for e in self.examples)

    def finish(self) -> None:
        """What every path does once the gradient is there."""
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_examples(geometry: Geometry, lengths: Sequence[int]) -> list[Example]:
    """Random prompts and completions; every completion token is trained."""
    examples = []
    for i, length in enumerate(lengths):
        prompt = torch.randint(geometry.vocab, (geometry.prompt,)).tolist()
        completion = torch.randint(geometry.vocab, (length,))
        request = Request(Prompt(i, prompt, prompt), i, 0, seed=0)
        rollout = request.rollout(completion.tolist(), [0.0] * length, stopped=False)
        examples.append(Example(rollout, torch.arange(length), completion, completion))
    return examples


def score(pair: Pair) -> list[Example]:
    """The examples with the teacher's log-probs, as the trainer gets them."""
    return teachers.score(LocalTeacher(pair.teacher, pair.geometry.max_tokens), pair.examples)


def train_on(
    pair: Pair, examples: Sequence[Example], objective: Objective, reward: rewards.Reward,
    full: bool = False,
) -> None:  # fmt: skip
    """Does what `poweropd.training.update.Updater` does in one process, less checks and records."""
    token_weight = 1 / sum(e.num_tokens for e in examples)
    for group in pack([e.student_length for e in examples], pair.geometry.max_tokens):
        batch = collate([examples[i] for i in group]).to(DEVICE)
        if full:
            with torch.no_grad():
                hidden = pair.teacher.hidden_states(batch.teacher)
            batch = replace(batch, teacher_hidden=hidden)
        loss, _ = pair.student(batch, objective, reward, token_weight)
        loss.backward()
    pair.finish()


def update_sampled(pair: Pair, reward: rewards.Reward) -> None:
    """Our update from sampled tokens."""
    train_on(pair, score(pair), Sampled(), reward)


def update_full_vocab(pair: Pair, reward: rewards.Reward) -> None:
    """Our update from both models' whole distributions."""
    train_on(pair, pair.examples, FullVocab(pair.teacher.head()), reward, full=True)


@dataclass(frozen=True)
class Cost:
    """Of one update, after a warm-up; `peak_bytes` is above what the process held before both."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int

    @classmethod
    def median(cls, costs: Sequence["Cost"]) -> "Cost":
        columns = zip(*(vars(c).values() for c in costs), strict=True)
        cpu, wall, peak = (statistics.median(column) for column in columns)
        return cls(cpu, wall, int(peak))


class Memory:
    """The peak above where the process stood when this was made."""

    def __init__(self) -> None:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):  # resets the high-water mark; not allowed everywhere
            Path("/proc/self/clear_refs").write_text("5")
        self.start = _held()

    def peak_bytes(self) -> int:
        return _high_water() - self.start


def _held() -> int:
    return torch.cuda.memory_allocated() if CUDA else _status("VmRSS")


def _high_water() -> int:
    return torch.cuda.max_memory_allocated() if CUDA else _status("VmHWM")


def _status(key: str) -> int:
    """Bytes from /proc; where there is none, the largest resident set so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(update: Callable[[], Any], updates: int = 1) -> Cost:
    """The median of `updates` updates after one that warms up."""
    memory = Memory()
    update()
    timed = [time_of(update) for _ in range(updates)]
    cpu, wall = (statistics.median(column) for column in zip(*timed, strict=True))
    return Cost(cpu, wall, memory.peak_bytes())


def seconds_of(call: Callable[[], Any]) -> float:
    """CPU seconds, or wall seconds where a GPU does the work."""
    return time_of(call)[CUDA]


def time_of(call: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of all threads, and wall seconds."""
    begun = now()
    call()
    return since(begun)


def now() -> tuple[float, float]:
    """CPU seconds of all threads so far, and the wall's, with all of a GPU's work done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def since(begun: tuple[float, float]) -> tuple[float, float]:
    """CPU and wall seconds since `now()` was `begun`."""
    cpu, wall = now()
    return cpu - begun[0], wall - begun[1]


def apart(threads: int, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a fresh process of its own, with so many torch threads."""
    with ProcessPoolExecutor(
        1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        return pool.submit(function, *arguments).result()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned first column, the others right-aligned."""
    table = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip(), flush=True)


def machine() -> str:
    """One line for the head of a table."""
    name = torch.cuda.get_device_name() if CUDA else _processor()
    return f"{name}, torch {torch.__version__}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"
