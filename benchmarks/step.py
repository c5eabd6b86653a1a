"""What a whole training step costs, sampling included: ours, TRL's trainer, and a plain loop.

    python benchmarks/step.py --geometry small --lengths fixed --threads 1 --repeats 3 --json F

A step samples completions of the prompts, scores them with the teacher and updates the student. All
paths have the same models, prompts, stop tokens and cap; each runs in a process of its own, in
turns, and makes one step that warms up and `--steps` that are timed. Ratios are taken within a
repeat. Models are random: `ragged` completions end at one of so many stop ids that they have about
106 of at most 256 tokens. The trl paths need `pip install 'trl>=1.16'`, and are skipped, with the
reason, where it is absent.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import (
    DEVICE,
    GEOMETRIES,
    Cost,
    Geometry,
    Memory,
    machine,
    now,
    print_table,
    since,
    time_of,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from turns import Unavailable, measure_in_turns, parsed, parser_of, ratio, trl_config, trl_module

from poweropd import Config, Trainer

LENGTHS = {"fixed": 0.0, "ragged": 1 / 120}  # share of the vocabulary that ends a completion
RATE = 5e-7
Seconds = list[tuple[float, float]]  # CPU and wall, of each step


# The pair, as directories that every path loads.


def make_pair(geometry: Geometry, lengths: str, out: Path) -> None:
    """Writes student, teacher and prompts. Token i is the word "i"; prompts are of one length."""
    vocab = {str(i): i for i in range(geometry.vocab)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="1")
    stops = max(1, round(LENGTHS[lengths] * geometry.vocab))
    torch.manual_seed(0)
    for name, shape in (("student", geometry.student), ("teacher", geometry.teacher)):
        model = shape.build(geometry.vocab, torch.float32)
        model.generation_config.eos_token_id = [0, *range(2, stops + 1)]
        model.generation_config.pad_token_id = 1
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    ids = torch.randint(stops + 1, geometry.vocab, (geometry.batch, geometry.prompt))
    rows = [{"prompt": " ".join(map(str, row))} for row in ids.tolist()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "prompts.jsonl").write_text(text)


# The paths: each makes the steps and returns what they took.


def ours(geometry: Geometry, pair: Path, out: Path, steps: int, **objective: Any) -> Seconds:
    """Our trainer with the embedded engine."""
    config = Config.from_dict(
        {
            "run": {"dir": str(out)},
            "model": {"student": str(pair / "student"), "dtype": geometry.dtype},
            "teacher": {"model": str(pair / "teacher"), "dtype": geometry.dtype},
            "data": {"prompts": str(pair / "prompts.jsonl"), "column": "prompt", "chat": None},
            "rollout": {"max_new_tokens": geometry.completion},
            "reward": {"name": "log_ratio"},
            "objective": objective,
            "train": {
                "steps": steps,
                "prompts_per_step": geometry.batch,
                "learning_rate": RATE,
                "max_tokens_per_batch": geometry.max_tokens,
            },
        }
    )
    trainer = Trainer(config, progress=False)
    return [time_of(partial(trainer.step, step)) for step in range(steps)]


class Clock(TrainerCallback):
    """Takes the time of every step of a trainer of transformers."""

    def __init__(self) -> None:
        self.begun: tuple[float, float] = (0.0, 0.0)
        self.seconds: Seconds = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(since(self.begun))


def trl(
    geometry: Geometry, pair: Path, out: Path, steps: int, adapter: bool = False, **options: Any
) -> Seconds:
    """TRL's DistillationTrainer, or our adapter of it, with transformers' `generate`."""
    if adapter:
        trainer_class = trl_module("poweropd.integrations.trl").PowerOPDTrainer
    else:
        trainer_class = trl_module("trl").DistillationTrainer
    from datasets import Dataset

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    rows = [json.loads(line) for line in (pair / "prompts.jsonl").open()]
    clock = Clock()
    trainer = trainer_class(
        model=student,
        teacher_model=teacher,
        args=trl_config(
            out,
            geometry.dtype,
            per_device_train_batch_size=geometry.batch,
            gradient_accumulation_steps=1,
            max_completion_length=geometry.completion,
            max_steps=steps,
            learning_rate=RATE,
            disable_tqdm=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(pair / "student"),
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        **options,
    )
    trainer.train()
    return clock.seconds


def naive(geometry: Geometry, pair: Path, out: Path, steps: int) -> Seconds:
    """The usual loop, which is the released code's: `generate`, a forward of each model for the
    reward, and one for the gradient, with the float32 log-softmax of everything."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32).to(DEVICE)
        for name in ("student", "teacher")
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    rows = [json.loads(line)["prompt"].split() for line in (pair / "prompts.jsonl").open()]
    prompts = torch.tensor([[int(word) for word in row] for row in rows], device=DEVICE)
    stops = torch.tensor(student.generation_config.eos_token_id, device=DEVICE)

    def step() -> None:
        with torch.no_grad():
            ids = student.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                top_p=1.0, max_new_tokens=geometry.completion,
            )  # fmt: skip
        targets = ids[:, prompts.shape[1] :]
        ended = torch.isin(targets, stops).cumsum(1)
        trained = ended == 0

        def log_probs(model: nn.Module) -> Tensor:
            logits = model(input_ids=ids, use_cache=False).logits
            every = logits[:, prompts.shape[1] - 1 : -1].float().log_softmax(-1)
            return every.gather(-1, targets[..., None]).squeeze(-1)

        with torch.no_grad():
            reward = log_probs(teacher) - log_probs(student)
        loss = -(reward * log_probs(student) * trained).sum() / trained.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return [time_of(step) for _ in range(steps)]


PATHS: dict[str, Callable[..., Seconds]] = {
    "ours": ours,
    "ours-full": partial(ours, kind="full_vocab"),
    "naive": naive,
    "trl": trl,
    "trl-adapter": partial(trl, adapter=True, reward="log_ratio"),
}


def run(path: str, geometry: Geometry, pair: Path, steps: int) -> Cost | str:
    """What a step costs in this process, or why there is none."""
    with TemporaryDirectory() as out:
        memory = Memory()
        try:
            seconds = PATHS[path](geometry, pair, Path(out) / "run", steps + 1)[1:]
        except Unavailable as error:
            return str(error)
    cpu, wall = (statistics.median(column) for column in zip(*seconds, strict=True))
    return Cost(cpu, wall, memory.peak_bytes())


def show(costs: dict[str, list[Cost]]) -> None:
    """Prints medians, and ratios to each of the other implementations."""
    others = [path for path in ("trl", "naive") if path in costs]
    header = ["path", "CPU s", "wall s", "peak GB"]
    header += [f"{what} / {other}" for other in others for what in ("CPU", "peak")]
    rows = []
    for path, own in costs.items():
        median = Cost.median(own)
        cells = [f"{median.cpu_seconds:.2f}", f"{median.wall_seconds:.2f}"]
        cells.append(f"{median.peak_bytes / 1e9:.2f}")
        for other in others:
            for what in ("cpu_seconds", "peak_bytes"):
                cells.append(f"{ratio(costs, path, other, what):.2f}")
        rows.append([path, *cells])
    print_table(header, rows)


def main() -> None:
    parser = parser_of(__doc__, LENGTHS)
    parser.add_argument("--steps", type=int, default=2, help="timed ones in each process")
    arguments = parsed(parser, PATHS)
    geometry = GEOMETRIES[arguments.geometry]
    geometry = replace(geometry, batch=arguments.batch or geometry.batch)
    print(f"{machine()}, {arguments.threads} threads")
    print(f"{arguments.geometry}, {geometry.batch} {arguments.lengths} completions of at most "
          f"{geometry.completion} tokens\n")  # fmt: skip
    with TemporaryDirectory() as folder:
        make_pair(geometry, arguments.lengths, Path(folder))
        costs, skipped = measure_in_turns(arguments, run, geometry, Path(folder), arguments.steps)
    show(costs)
    for path, reason in skipped.items():
        print(f"{path}: skipped: {reason}")
    if arguments.json:
        found = {path: [asdict(cost) for cost in own] for path, own in costs.items()}
        settings = {"geometry": arguments.geometry, "lengths": arguments.lengths}
        text = json.dumps({"machine": machine(), **settings, "costs": found}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
