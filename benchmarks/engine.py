"""What completions cost by the transformers engine, and by transformers' own `model.generate`.

    python benchmarks/engine.py --geometry small --lengths ragged --threads 1 --repeats 3 --json F

Both sample from the same random student, with the same prompts, cap and stop ids, `--batch`
completions at once; `generate` takes them in chunks. Each runs in a process of its own, in turns,
after a short call that warms up. Costs are of 1,000 sampled tokens, up to each completion's stop;
`ragged` completions end at one of so many stop ids that they have about 100 of at most 256 tokens.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from common import DEVICE, GEOMETRIES, Cost, Geometry, Memory, machine, print_table, time_of
from transformers import PreTrainedModel
from turns import measure_in_turns, parsed, parser_of, ratio

from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Request
from poweropd.models.devices import torch_dtype
from poweropd.rollouts.base import Sampling, completion_seed
from poweropd.rollouts.transformers import TransformersEngine

LENGTHS = {"fixed": 0.0, "ragged": 1 / 112}  # share of the vocabulary that ends a completion
BATCH = 128  # the default of rollout.batch_size
WARM_UP = 8  # tokens
Sample = Callable[[list[list[int]], int], int]  # prompts, most new tokens -> sampled tokens


def engine(model: PreTrainedModel, geometry: Geometry, stop_ids: tuple[int, ...]) -> Sample:
    """Our engine, its check of decoding done."""
    own = TransformersEngine(model, vocab_size=geometry.vocab, batch_size=geometry.batch)
    own.check_decoding()

    def sample(prompts: list[list[int]], tokens: int) -> int:
        requests = [
            Request(Prompt(i, ids, ids), i, 0, completion_seed(0, 0, i, 0))
            for i, ids in enumerate(prompts)
        ]
        rollouts = own.generate(requests, Sampling(tokens, stop_ids))
        return sum(len(rollout.completion_ids) for rollout in rollouts)

    return sample


def generate(model: PreTrainedModel, geometry: Geometry, stop_ids: tuple[int, ...]) -> Sample:
    """transformers' own loop; its seeds are those of a batch, and it records no log-probs."""

    def sample_chunk(prompts: list[list[int]], tokens: int) -> int:
        inputs = torch.tensor(prompts, device=DEVICE)
        ids = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=0,
        )[:, inputs.shape[1] :]
        stopped = torch.isin(ids, torch.tensor(stop_ids, dtype=torch.int64, device=DEVICE))
        before = (stopped.cumsum(1) - stopped.long()) == 0
        return int(before.sum())

    def sample(prompts: list[list[int]], tokens: int) -> int:
        size = geometry.batch
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return sum(sample_chunk(chunk, tokens) for chunk in chunks)

    return sample


PATHS: dict[str, Callable[..., Sample]] = {"engine": engine, "generate": generate}


def run(path: str, geometry: Geometry, lengths: str, count: int) -> Cost:
    """What 1,000 tokens cost in this process, of `count` completions."""
    torch.manual_seed(0)
    model = geometry.student.build(geometry.vocab, torch_dtype(geometry.dtype)).eval()
    stop_ids = tuple(range(round(LENGTHS[lengths] * geometry.vocab)))
    prompts = torch.randint(len(stop_ids), geometry.vocab, (count, geometry.prompt)).tolist()
    sample, memory, found = PATHS[path](model, geometry, stop_ids), Memory(), []
    sample(prompts[: geometry.batch], WARM_UP)
    cpu, wall = time_of(lambda: found.append(sample(prompts, geometry.completion)))
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
    arguments = parsed(parser, PATHS)
    geometry = replace(GEOMETRIES[arguments.geometry], batch=arguments.batch or BATCH)
    settings = {"geometry": arguments.geometry, "lengths": arguments.lengths}
    settings |= {"batch": geometry.batch, "prompts": arguments.prompts}
    print(f"{machine()}, {arguments.threads} threads")
    print(", ".join(f"{name}: {value}" for name, value in settings.items()), end="\n\n")
    costs, _ = measure_in_turns(arguments, run, geometry, arguments.lengths, arguments.prompts)
    show(costs)
    if arguments.json:
        found = {path: [asdict(cost) for cost in own] for path, own in costs.items()}
        text = json.dumps({"machine": machine(), **settings, "per_1000_tokens": found}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
