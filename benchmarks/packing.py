"""Padded against flat micro-batches, on one model's forward and backward (the body, not the head).

    python benchmarks/packing.py --lengths ragged --threads 1

Prints the medians of CPU seconds (wall seconds on a GPU) over `--repeats` passes that take turns,
and the tokens that each layout computes on. `--compile` compiles the decoder layers first.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import common
import torch
from transformers import Qwen3ForCausalLM

from poweropd.data.batch import Sequences, pack
from poweropd.models.attention import PADDED
from poweropd.models.devices import torch_dtype
from poweropd.models.language_model import Student

HEADER = ["layout", "budget", "micro-batches", "tokens", "seconds"]
LAYOUTS = {"padded": False, "flat": True}


def micro_batches(rows: Sequence[list[int]], max_tokens: int, flat: bool) -> list[Sequences]:
    made = []
    for group in pack([len(row) for row in rows], max_tokens, flat):
        members = [rows[i] for i in group]
        indices = [torch.arange(len(row)) for row in members]
        targets = torch.cat([torch.tensor(row) for row in members])
        made.append(Sequences.collate(members, indices, targets, flat).to(common.DEVICE))
    return made


def one_pass(student: Student, batches: Sequence[Sequences]) -> None:
    for batch in batches:
        student.hidden_states(batch).float().square().mean().backward()
    student.zero_grad()


def build(geometry: common.Geometry, attention: str, compiled: bool) -> Student:
    torch.manual_seed(0)
    model: Qwen3ForCausalLM = geometry.student.build(geometry.vocab, torch.float32)
    model.set_attn_implementation(attention)
    student = Student(model, geometry.vocab, torch_dtype(geometry.dtype))
    if compiled:
        for layer in student.layers:
            layer.compile(dynamic=True)
    return student


def compare(options: argparse.Namespace) -> tuple[int, list[list[str]]]:
    """The number of tokens, and a line for each layout at each budget."""
    geometry = common.GEOMETRIES[options.geometry]
    student = build(geometry, options.attention, options.compile)
    lengths = [geometry.prompt + n - 1 for n in geometry.lengths(options.lengths)]
    rows = [torch.randint(geometry.vocab, (length,)).tolist() for length in lengths]
    table = []
    for max_tokens in options.max_tokens or [geometry.max_tokens]:
        batches = {k: micro_batches(rows, max_tokens, flat) for k, flat in LAYOUTS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        for repeat in range(options.repeats + 1):
            for name in LAYOUTS:
                took = common.seconds_of(partial(one_pass, student, batches[name]))
                if repeat:  # the first warms up
                    seconds[name].append(took)
        for name in LAYOUTS:
            computed = sum(batch.input_ids.numel() for batch in batches[name])
            median = statistics.median(seconds[name])
            row = [name, str(max_tokens), str(len(batches[name])), str(computed), f"{median:.3f}"]
            table.append(row)
    return sum(lengths), table


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--geometry", choices=common.GEOMETRIES, default="small")
    made.add_argument("--lengths", choices=common.LENGTHS, default="ragged")
    made.add_argument("--attention", default=PADDED[0], help="a name of transformers")
    made.add_argument("--max-tokens", type=int, nargs="*", help="budgets of a micro-batch")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--compile", action="store_true")
    return made


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    tokens, table = compare(options)
    rows = common.GEOMETRIES[options.geometry].batch
    print(f"{common.machine()}; {options.attention}, {tokens} tokens in {rows} rows")
    common.print_table(HEADER, table)


if __name__ == "__main__":
    main()
