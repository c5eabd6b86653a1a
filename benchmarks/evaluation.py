"""What an evaluation costs beside its sampling: prompts, decoding, grading, files and summary.

    python benchmarks/evaluation.py --data FOLDER --json evaluation.json

FOLDER has NAME.jsonl (id, problem, answer) for the names of `poweropd eval --benchmark`. There is
one canned completion for each problem: a derivation of some 200 words with a boxed answer at its
end. Every third has the gold of the problem after it. The tokenizer knows bytes alone, so it costs
no less than a real one. CPU seconds are those of a process for each set, and of its grading
workers, which each import what compares answers.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from common import apart, machine, now, print_table, since
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from poweropd.data.rollout import Request, Rollout
from poweropd.evaluation.benchmarks import Problem, ProblemSet, load_benchmark
from poweropd.evaluation.runner import Subject, run_benchmarks
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.rollouts.base import Sampling

SETS = ("gsm8k", "math500", "amc23", "aime24", "aime25", "minerva", "olympiadbench")
STEP = "Since $a_{n} = 2 a_{n - 1} + 1$ holds, the next term is at most $\\frac{3}{4} n^2$. "


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and a stop token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<stop>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<stop>")


def completion(problems: Sequence[Problem], number: int) -> str:
    """The canned completion of a problem; every third has another problem's answer."""
    other = (number + 1) % len(problems) if number % 3 == 2 else number
    return f"{STEP * 12}So the answer is $\\boxed{{{problems[other].answer}}}$."


class Canned:
    """An engine that has its completions already."""

    concurrent = False

    def __init__(self, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast) -> None:
        texts = [completion(problems, number) for number in range(len(problems))]
        self.ids = tokenizer(texts, add_special_tokens=False)["input_ids"]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        for request in requests:
            yield request.rollout([*self.ids[request.prompt_index], *sampling.stop_ids], [], True)

    def sync(self) -> None:
        """Has no weights to take over."""


def workers_seconds() -> float:
    """CPU seconds of the grading workers, and of the server that forks them and outlives them."""
    below = psutil.Process().children(recursive=True)
    return sum(sum(process.cpu_times()[:4]) for process in below)  # with those of ended children


def cost_of(name: str, data: Path) -> dict[str, Any]:
    """CPU seconds of the evaluation on one set, in this process and in its workers."""
    tokenizer = byte_tokenizer()
    problems = load_benchmark(name, data)
    subject = Subject(Canned(problems, tokenizer), tokenizer, (256,), 2**20, "canned")
    settings = EvaluationSettings(n=1, max_new_tokens=4096, chat=None)
    begun = now()
    with tempfile.TemporaryDirectory() as folder:
        sets = {name: ProblemSet(problems, settings)}
        rows = run_benchmarks(subject, sets, Path(folder), progress=False)[name].rows
    cpu, wall = since(begun)
    workers, right = workers_seconds(), sum(row["correct"] for row in rows)
    expected = sum(number % 3 != 2 for number in range(len(problems)))
    return {
        "set": name,
        "problems": len(problems),
        "right": right,
        "right ones given": expected,
        "CPU s": cpu,
        "CPU s of workers": workers,
        "wall s": wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    rows = []
    for name in arguments.sets.split(","):
        found = [apart(1, cost_of, name, arguments.data) for _ in range(arguments.repeats)]
        spent = ("CPU s", "CPU s of workers", "wall s")
        rows.append(found[0] | {key: statistics.median(f[key] for f in found) for key in spent})
    print_table(
        list(rows[0]),
        [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows],
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "sets": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
