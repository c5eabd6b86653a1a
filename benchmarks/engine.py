"""What completions cost by the transformers engine, and by transformers' own `model.generate`.

    python benchmarks/engine.py --geometry small --lengths ragged --threads 1 --repeats 3 --json F
    python benchmarks/engine.py --model DIR --problems FILE.jsonl --prompts 64 --batch 32

Both sample from the same student, with the same prompts, cap and stop ids, `--batch` completions at
once; `generate` takes them in chunks, the longest prompts first. Each runs in a process of its own,
in turns, after a short call that warms up. Costs are of 1,000 sampled tokens, up to each
completion's stop.

The student is random, and `ragged` completions end at one of so many stop ids that they have about
100 of at most 256 tokens; or it is the model in DIR, which is asked the column `problem` of a file
through its chat template, and `ragged` completions end where it ends them. `fixed` ones never do.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from common import DEVICE, GEOMETRIES, Cost, Geometry, Memory, machine, print_table, time_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from turns import measure_in_turns, parsed, parser_of, ratio

from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Request
from poweropd.models.devices import torch_dtype
from poweropd.rollouts.base import Sampling, completion_seed
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.stops import stop_ids

LENGTHS = {"fixed": 0.0, "ragged": 1 / 112}  # share of the vocabulary that ends a completion
BATCH = 128  # the default of rollout.batch_size
WARM_UP = 8  # tokens


@dataclass(frozen=True)
class Case:
    """What is sampled from, and how."""

    model: PreTrainedModel
    vocab: int
    prompts: list[list[int]]
    stop_ids: tuple[int, ...]
    batch: int

    @classmethod
    def random(cls, geometry: Geometry, lengths: str, count: int) -> "Case":
        """A random student, and prompts of one length."""
        torch.manual_seed(0)
        model = geometry.student.build(geometry.vocab, torch_dtype(geometry.dtype)).eval()
        stops = tuple(range(round(LENGTHS[lengths] * geometry.vocab)))
        prompts = torch.randint(len(stops), geometry.vocab, (count, geometry.prompt)).tolist()
        return cls(model, geometry.vocab, prompts, stops, geometry.batch)

    @classmethod
    def real(cls, real: "Real", lengths: str, count: int, batch: int) -> "Case":
        """A pretrained model, and problems in its chat template."""
        model = AutoModelForCausalLM.from_pretrained(real.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(real.model)
        with real.problems.open() as file:
            problems = [json.loads(line)["problem"] for line in islice(file, count)]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": problem}],
                add_generation_prompt=True,
                return_dict=False,
            )
            for problem in problems
        ]
        prompts.sort(key=len, reverse=True)
        stops = stop_ids(tokenizer, model.generation_config) if LENGTHS[lengths] else []
        return cls(model.to(DEVICE), model.config.vocab_size, prompts, tuple(stops), batch)


@dataclass(frozen=True)
class Real:
    """Where a pretrained model and its problems are."""

    model: Path
    problems: Path


Sample = Callable[[list[list[int]], int], int]  # prompts, most new tokens -> sampled tokens


def engine(case: Case) -> Sample:
    """Our engine, its check of decoding done."""
    own = TransformersEngine(case.model, vocab_size=case.vocab, batch_size=case.batch)
    own.check_decoding()

    def sample(prompts: list[list[int]], tokens: int) -> int:
        requests = [
            Request(Prompt(i, ids, ids), i, 0, completion_seed(0, 0, i, 0))
            for i, ids in enumerate(prompts)
        ]
        rollouts = own.generate(requests, Sampling(tokens, case.stop_ids))
        return sum(len(rollout.completion_ids) for rollout in rollouts)

    return sample


def generate(case: Case) -> Sample:
    """transformers' own loop; its seeds are those of a batch, and it records no log-probs."""
    case.model.generation_config.eos_token_id = list(case.stop_ids) or None

    def sample_chunk(prompts: list[list[int]], tokens: int) -> int:
        width = max(map(len, prompts))
        inputs = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=DEVICE)
        padding = torch.tensor([[width - len(ids)] for ids in prompts], device=DEVICE)
        ids = case.model.generate(
            inputs,
            attention_mask=(torch.arange(width, device=DEVICE) >= padding).long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=tokens,
            pad_token_id=0,
        )[:, width:]
        stopped = torch.isin(ids, torch.tensor(case.stop_ids, dtype=torch.int64, device=DEVICE))
        before = (stopped.cumsum(1) - stopped.long()) == 0
        return int(before.sum())

    def sample(prompts: list[list[int]], tokens: int) -> int:
        size = case.batch
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return sum(sample_chunk(chunk, tokens) for chunk in chunks)

    return sample


PATHS: dict[str, Callable[[Case], Sample]] = {"engine": engine, "generate": generate}


def run(path: str, geometry: Geometry, lengths: str, count: int, real: Real | None = None) -> Cost:
    """What 1,000 tokens cost in this process, of `count` completions."""
    if real:
        case = Case.real(real, lengths, count, geometry.batch)
    else:
        case = Case.random(geometry, lengths, count)
    sample, memory, found = PATHS[path](case), Memory(), []
    sample(case.prompts[: case.batch], WARM_UP)
    cpu, wall = time_of(lambda: found.append(sample(case.prompts, geometry.completion)))
    thousands = found[0] / 1000
    return Cost(cpu / thousands, wall / thousands, memory.peak_bytes())


def show(costs: dict[str, list[Cost]]) -> None:
    """Prints medians, and the ratio to `generate`."""
    rows = []
    for path, own in costs.items():
        median = Cost.median(own)
        cells = [f"{1000 / median.cpu_seconds:,.0f}", f"{1000 / median.wall_seconds:,.0f}"]
        cells.append(f"{median.peak_bytes / 1e9:.2f}")
        if "generate" in costs:
            cells.append(f"{1 / ratio(costs, path, 'generate', 'cpu_seconds'):.2f}")
        rows.append([path, *cells])
    header = ["path", "tokens / CPU s", "tokens / s", "peak GB", "times generate"]
    print_table(header[: len(rows[0])], rows)


def main() -> None:
    parser = parser_of(__doc__, LENGTHS)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--problems", type=Path, metavar="FILE")
    arguments = parsed(parser, PATHS)
    geometry = replace(GEOMETRIES[arguments.geometry], batch=arguments.batch or BATCH)
    real = None
    if arguments.model:
        real = Real(arguments.model, arguments.problems or parser.error("--model needs --problems"))
    settings = {"model": real.model.name} if real else {"geometry": arguments.geometry}
    settings |= {"lengths": arguments.lengths}
    settings |= {"batch": geometry.batch, "prompts": arguments.prompts}
    print(f"{machine()}, {arguments.threads} threads")
    print(", ".join(f"{name}: {value}" for name, value in settings.items()), end="\n\n")
    costs, _ = measure_in_turns(
        arguments, run, geometry, arguments.lengths, arguments.prompts, real
    )
    show(costs)
    if arguments.json:
        found = {path: [asdict(cost) for cost in own] for path, own in costs.items()}
        text = json.dumps({"machine": machine(), **settings, "per_1000_tokens": found}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
