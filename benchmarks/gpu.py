"""Everything that docs/performance.md wants to know of a GPU, by one command within nine minutes.

    python benchmarks/gpu.py --out FOLDER [--only machine,update,...] [--geometry tiny]

Needs torch, transformers and this package, no network, and no model: weights are random. Writes
FOLDER/gpu.json and FOLDER/gpu.md after every part. A part runs in a process of its own, which is
stopped when it takes longer than its share; what cannot run is left out, with the reason.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import engine as engines
import packing
import torch
from common import CUDA, DEVICE, GEOMETRIES, Cost, Geometry, Pair, machine, measure, seconds_of
from context import ALL_PATHS, long, peak
from scaling import phase_flops, phase_seconds
from update import matmul_ceiling, update_flops
from update import run as update_cost

from poweropd import Config, Trainer
from poweropd.config.shipped import shipped_recipe
from poweropd.kernels import Head, linear_policy_gradient, reference
from poweropd.models.devices import torch_dtype

Row = dict[str, Any]
Rows = Iterator[Row]
GB = 1e9
UPDATE_PATHS = ("ours", "ours-full", "naive", "trl-logprob", "trl-full")
SKIPPED = "skipped, since"


def freed() -> None:
    """Gives the memory of the row before back."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def row_or_reason(what: Row, found: Cost | str, more: Callable[[Cost], Row]) -> Row:
    """A row of costs, or of the reason for which there are none."""
    return what | ({SKIPPED: found} if isinstance(found, str) else more(found))


def cost_cells(cost: Cost) -> Row:
    """Seconds and peak memory: those of the clock where a GPU does the work."""
    seconds = cost.wall_seconds if CUDA else cost.cpu_seconds
    return {"s": seconds, "peak, GB": cost.peak_bytes / GB}


# The parts: each yields the rows of its table, the first ones also if the later ones fail.


def ceilings(base: Geometry) -> Rows:
    """The machine, and what its matmuls and its memory reach."""
    size = 2**28 if CUDA else 2**22
    values = torch.ones(size, device=DEVICE)
    copied = torch.empty_like(values)
    copied.copy_(values)
    seconds = min(seconds_of(lambda: copied.copy_(values)) for _ in range(10))
    memory = torch.cuda.get_device_properties(0).total_memory / GB if CUDA else 0.0
    yield {"what": machine(), "value": memory, "unit": "GB of memory"}
    for dtype in ("bfloat16", "float32") if CUDA else ("float32",):
        found = matmul_ceiling(dtype) / 1e12
        yield {"what": f"square matmul, {dtype}", "value": found, "unit": "TFLOP/s"}
    yield {"what": "copy", "value": 8 * size / seconds / GB, "unit": "GB/s"}


def updates(base: Geometry) -> Rows:
    """One update, by every path, at two batch sizes."""
    ceiling = matmul_ceiling(base.dtype)
    for batch in dict.fromkeys((base.batch, max(1, base.batch // 4))):
        geometry = replace(base, batch=batch)
        flops = update_flops(geometry, geometry.lengths("fixed"))
        for path in UPDATE_PATHS:
            found = update_cost(path, geometry, "fixed", 2)
            freed()

            def cells(cost: Cost, flops: float = flops, batch: int = batch) -> Row:
                own = cost_cells(cost)
                share = flops / own["s"] / ceiling
                tokens = batch * base.completion / own["s"]
                return own | {"of the matmul ceiling": share, "tokens/s": tokens}

            yield row_or_reason({"batch": batch, "path": path}, found, cells)


def phases(base: Geometry) -> Rows:
    """Where the time of an update goes."""
    seconds, flops = phase_seconds(base), phase_flops(base)
    total = sum(seconds.values())
    for phase, spent in seconds.items():
        speed = flops[phase] / spent / 1e12
        yield {"phase": phase, "s": spent, "share": spent / total, "TFLOP/s": speed}


def gradients(base: Geometry) -> Rows:
    """Relative errors of gradients of the head in bfloat16, to float32's of the same numbers."""
    torch.manual_seed(0)
    tokens, width = min(1024, base.completion), base.student.hidden
    hidden = torch.randn(tokens, width, device=DEVICE).bfloat16()
    weight = (torch.randn(base.vocab, width, device=DEVICE) / width**0.5).bfloat16()
    targets = torch.randint(base.vocab, (tokens,), device=DEVICE)
    coefficients = torch.randn(tokens, device=DEVICE)

    def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_policy_gradient(h, w, targets, lambda _, some: coefficients[some])

    def autograd(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return reference.policy_gradient(h, Head(w), targets, lambda _: coefficients)

    def of(loss: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        return [g.float() for g in torch.autograd.grad(loss(*inputs), inputs)]

    exact = of(autograd, torch.float32)
    cases = {"ours, float32": (ours, torch.float32), "ours, bfloat16": (ours, torch.bfloat16)}
    for name, case in (cases | {"autograd, bfloat16": (autograd, torch.bfloat16)}).items():
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(of(*case), exact, strict=True)]
        yield {"gradient": name, "of hidden states": errors[0], "of the weight": errors[1]}
        freed()


def memory(base: Geometry) -> Rows:
    """The peak of an update of one completion against its length and the vocabulary."""
    lengths = [base.completion * factor for factor in (8, 16, 32)]
    for path in ("ours", "ours-full", "ours-checkpointed", "naive"):
        for vocab in dict.fromkeys((base.vocab, 2**18 if CUDA else 2 * base.vocab)):
            row: Row = {"path": path, "V": vocab}
            for tokens in lengths:
                found = peak(path, long(base, vocab, tokens), 1e3)
                row[f"{tokens} tokens, GB"] = found if isinstance(found, str) else found / GB
                freed()
            yield row


def engine(base: Geometry) -> Rows:
    """Tokens a second of the embedded engine and of transformers' `generate`."""
    geometry = replace(base, batch=2 * base.batch, completion=min(256, base.completion))
    for path in engines.PATHS:
        cost = engines.run(path, geometry, "fixed", geometry.batch)
        seconds = cost.wall_seconds if CUDA else cost.cpu_seconds
        tokens = {"completions": geometry.batch, "tokens": geometry.completion}
        yield {"sampler": path, **tokens, "tokens/s": 1000 / seconds}
        freed()


def training(base: Geometry) -> Rows:
    """Losses of the demo's first steps in float32, on this device and on the CPU."""
    here = losses()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    code = "import gpu, json; print(json.dumps(gpu.losses()))"
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    there = json.loads(done.stdout.splitlines()[-1])
    for step, (own, cpu) in enumerate(zip(here, there, strict=True), 1):
        difference = abs(own - cpu) / abs(cpu)
        yield {"step": step, "loss here": own, "loss, CPU": cpu, "relative difference": difference}


def losses(steps: int = 5) -> list[float]:
    """The losses of the demo's first steps, on the device that accelerate finds."""
    with TemporaryDirectory() as folder:
        options = [f"run.dir={folder}/run", f"train.steps={steps}"]
        trainer = Trainer(Config.load(shipped_recipe("demo.yaml"), options), progress=False)
        return [float(trainer.step(step)["loss"]) for step in range(steps)]


def attentions(base: Geometry) -> Rows:
    """Forward and backward of the student's body, padded and flat, by attention, and compiled."""
    cases = [("sdpa", False), ("flash_attention_2", False), ("flex_attention", False)]
    for attention, compiled in [*cases, ("sdpa", True)] if CUDA else cases[:2]:
        options = packing.parser().parse_args(["--attention", attention, "--repeats", "3"])
        options.geometry, options.compile = geometry_name(base), compiled
        what: Row = {"attention": attention, "layers": "compiled" if compiled else "eager"}
        try:
            table = packing.compare(options)[1]
        except (ImportError, ValueError, RuntimeError) as error:
            yield what | {SKIPPED: str(error).strip().partition("\n")[0][:160]}
            continue
        finally:
            freed()
        for line in table:
            named = dict(zip(packing.HEADER, line, strict=True))
            yield what | named | {"seconds": float(named["seconds"])}


def checkpointing(base: Geometry) -> Rows:
    """One update with and without activation checkpointing."""
    for path in ("ours", "ours-checkpointed"):
        pair = Pair.build(base, "fixed")
        yield {"path": path} | cost_cells(measure(ALL_PATHS[path](pair)))
        del pair
        freed()


def head_chunks(base: Geometry) -> Rows:
    """Forward and backward of the student's head by the tokens of a chunk."""
    torch.manual_seed(0)
    tokens, width = base.batch * base.completion // 4, base.student.hidden
    dtype = torch_dtype(base.dtype)
    hidden = torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(base.vocab, width, device=DEVICE, requires_grad=True)
    targets = torch.randint(base.vocab, (tokens,), device=DEVICE)
    coefficients = torch.randn(tokens, device=DEVICE)

    def both(size: int | None) -> None:
        loss = linear_policy_gradient(
            hidden, weight, targets, lambda _, some: coefficients[some], chunk_size=size
        )
        torch.autograd.grad(loss, (hidden, weight))

    for size in (None, *(max(1, tokens // n) for n in (32, 16, 8, 4, 2))):
        both(size)
        seconds = statistics.median(seconds_of(lambda size=size: both(size)) for _ in range(3))
        speed = 6 * tokens * width * base.vocab / seconds / 1e12
        yield {"tokens of a chunk": size or "default", "s": seconds, "TFLOP/s": speed}
        freed()


@dataclass(frozen=True)
class Part:
    """One table: what makes its rows, its title, and the seconds that it may take."""

    rows: Callable[[Geometry], Rows]
    title: str
    limit: float


PARTS = {
    "machine": Part(ceilings, "Machine", 60),
    "update": Part(updates, "One update", 150),
    "phases": Part(phases, "Where the time goes", 60),
    "engine": Part(engine, "Sampling", 90),
    "gradients": Part(gradients, "Gradients in bfloat16", 40),
    "training": Part(training, "The same losses as on a CPU", 90),
    "memory": Part(memory, "Memory against length and vocabulary", 90),
    "checkpointing": Part(checkpointing, "Checkpointing", 60),
    "attention": Part(attentions, "Padded and flat, by attention", 120),
    "chunks": Part(head_chunks, "Chunks of the head", 40),
}


def geometry_name(geometry: Geometry) -> str:
    """The name of one of `GEOMETRIES`."""
    return next(name for name, known in GEOMETRIES.items() if known == geometry)


def run_part(name: str, geometry: str, out: Path) -> None:
    """Writes the rows of a part as they come, one JSON object a line; in a process of its own."""
    with out.open("w") as file:
        for row in PARTS[name].rows(GEOMETRIES[geometry]):
            file.write(json.dumps(row) + "\n")
            file.flush()


def outcome(name: str, geometry: str, folder: Path, limit: float) -> dict[str, Any]:
    """Runs a part in a process of its own: its rows, its seconds, and why there are not more."""
    out, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    out.write_text("")
    command = [sys.executable, __file__, "--part", name, "--geometry", geometry]
    begun, reason = time.perf_counter(), None
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--out", str(out)], stdout=file, stderr=file, start_new_session=True
        )
        try:
            if process.wait(max(limit, 1.0)):
                lines = log.read_text().strip().splitlines()
                reason = lines[-1][:200] if lines else f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reason = f"it took more than {limit:.0f} s"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {"rows": rows, "seconds": time.perf_counter() - begun, "stopped": reason}


def text_of(value: object) -> str:
    """A number with three digits, or what is there."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def markdown(found: dict[str, Any]) -> str:
    """All tables, in the form of docs/performance.md."""
    lines = [f"# {found['machine']}", "", f"Geometry `{found['geometry']}`."]
    for name, part in found["parts"].items():
        lines += ["", f"## {PARTS[name].title}", ""]
        keys = list(dict.fromkeys(key for row in part["rows"] for key in row))
        if keys:
            lines += [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
            for row in part["rows"]:
                lines.append(f"| {' | '.join(text_of(row.get(key, '')) for key in keys)} |")
        if part["stopped"]:
            lines += ["", f"Not complete: {part['stopped']}"]
    return "\n".join(lines) + "\n"


def names(text: str) -> list[str]:
    """Reads the names of parts with commas between them."""
    found = text.split(",")
    if unknown := {*found} - {*PARTS}:
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(PARTS)}, got {min(unknown)!r}"
        )
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", type=names, default=list(PARTS), metavar="PART,PART")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="qwen3-0.6b-from-4b")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure_all(options: argparse.Namespace) -> None:
    """Runs the parts one after another while there is time, and writes what is known after each."""
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * options.minutes
    found: dict[str, Any] = {"machine": machine(), "geometry": options.geometry, "parts": {}}
    for name in options.only:
        left = end - time.perf_counter()
        part = {"rows": [], "seconds": 0.0, "stopped": "no time was left"}
        if left > 0:
            part = outcome(name, options.geometry, options.out, min(PARTS[name].limit, left))
        found["parts"][name] = part
        reason = part["stopped"] or ""
        print(f"{name}: {len(part['rows'])} rows in {part['seconds']:.0f} s {reason}", flush=True)
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "gpu.md").write_text(markdown(found))
    print(f"wrote {options.out}/gpu.json and {options.out}/gpu.md")


def main() -> None:
    options = parse()
    if options.part:
        run_part(options.part, options.geometry, options.out)
    else:
        measure_all(options)


if __name__ == "__main__":
    main()
