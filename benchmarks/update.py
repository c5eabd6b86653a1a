"""What one update costs: ours beside the usual implementations, each in its own process.

    python benchmarks/update.py --geometry small --lengths fixed --threads 1 --repeats 3 \
        --paths ours,ours-full,naive,trl-logprob,trl-full --json update.json

One update is the teacher's scoring, the student's forward and backward, clipping and AdamW; each
process makes one that warms up and `--updates` that are timed. Processes follow one another,
path by path in each repeat, and ratios are taken within a repeat. `peak_bytes` is above what the
process held before the warm-up, so it counts gradients and the optimizer's state.

The trl paths need `pip install 'trl>=1.16'` and are skipped, with the reason, where it is absent.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from common import (
    CUDA,
    DEVICE,
    GEOMETRIES,
    LENGTHS,
    Cost,
    Geometry,
    Pair,
    machine,
    measure,
    print_table,
    seconds_of,
    update_full_vocab,
    update_sampled,
)
from torch import Tensor
from transformers import AutoTokenizer
from turns import (
    Unavailable,
    measure_in_turns,
    parsed,
    parser_of,
    ratio,
    trl_config,
    trl_module,
)

from poweropd import embedded, rewards
from poweropd.models import DTYPES
from poweropd.models.devices import torch_dtype
from poweropd.models.language_model import LanguageModel

# Random models give every token a probability near 1 / V, where a power would vanish. For the
# full vocabulary this is the reverse KL, TRL's own divergence.
REWARD = rewards.create("log_ratio")
TRL_CHUNK = 32768  # of the vocabulary: what TRL's trainers use
Update = Callable[[], None]


@dataclass(frozen=True)
class Padded:
    """The whole step as one padded batch; the prompts are of one length."""

    ids: Tensor  # [B, P + T]
    mask: Tensor  # [B, P + T]
    trained: Tensor  # [B, T] bool
    targets: Tensor  # [B, T]

    @classmethod
    def of(cls, pair: Pair, width: int | None = None) -> "Padded":
        """Completions padded to `width`, or to the longest."""
        counts = torch.tensor([e.num_tokens for e in pair.examples])
        width = width or int(counts.max())
        prompt = pair.geometry.prompt
        ids = torch.zeros(len(counts), prompt + width, dtype=torch.long)
        for row, e in zip(ids, pair.examples, strict=True):
            row[: prompt + e.num_tokens] = torch.tensor(
                e.rollout.prompt_ids + e.rollout.completion_ids
            )
        trained = torch.arange(width) < counts[:, None]
        mask = torch.cat([torch.ones(len(counts), prompt, dtype=torch.bool), trained], 1).long()
        columns = (ids, mask, trained, ids[:, prompt:])
        return cls(*(column.to(DEVICE) for column in columns))

    def hidden_states(self, model: LanguageModel) -> Tensor:
        """[B, T, H] that predict the completions."""
        with model.autocast():
            output = model.causal_lm.base_model(
                input_ids=self.ids, attention_mask=self.mask, use_cache=False
            )
        return output.last_hidden_state[:, -self.targets.shape[1] - 1 : -1]

    def whole_log_softmax(self, model: LanguageModel) -> Tensor:
        """[B, T, V] float32 log-probabilities."""
        keep = self.targets.shape[1] + 1
        with model.autocast():
            logits = model.causal_lm(
                input_ids=self.ids, attention_mask=self.mask, use_cache=False, logits_to_keep=keep
            ).logits[:, :-1]
        return logits.float().log_softmax(-1)

    def of_targets(self, log_probs: Tensor) -> Tensor:
        """[B, T] from [B, T, V]."""
        return log_probs.gather(-1, self.targets[..., None]).squeeze(-1)


def ours(pair: Pair) -> Update:
    """Sampled tokens: one forward of each model, no logits, packed by length."""
    return lambda: update_sampled(pair, REWARD)


def ours_full(pair: Pair) -> Update:
    """The exact gradient over the vocabulary, here of the reverse KL."""
    return lambda: update_full_vocab(pair, REWARD)


def naive(pair: Pair) -> Update:
    """The usual implementation, which is the released code's: a forward of the student for the
    reward and one for the gradient, completions padded to the cap, and the float32 log-softmax of
    each forward held to the end of the update."""

    def update() -> None:
        batch = Padded.of(pair, pair.geometry.completion)
        with torch.no_grad():
            teacher = batch.whole_log_softmax(pair.teacher)
            student = batch.whole_log_softmax(pair.student)
            reward = REWARD(batch.of_targets(teacher), batch.of_targets(student))
        trained = batch.whole_log_softmax(pair.student)
        loss = -(reward * batch.of_targets(trained) * batch.trained).sum() / pair.num_tokens
        loss.backward()
        pair.finish()

    return update


def trl_logprob(pair: Pair) -> Update:
    """A loop around TRL's chunked log-probabilities, for both models, of trained tokens only."""
    function = trl_module("trl.kernels").ChunkedLogProbFunction

    def log_probs(model: LanguageModel, batch: Padded) -> Tensor:
        hidden = batch.hidden_states(model)[batch.trained]
        head = model.causal_lm.get_output_embeddings()
        targets = batch.targets[batch.trained]
        with model.autocast():
            # Ours reports the entropy too.
            return function.apply(
                hidden, head.weight, head.bias, targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
            )[0]

    def update() -> None:
        batch = Padded.of(pair)
        with torch.no_grad():
            teacher_log_probs = log_probs(pair.teacher, batch)
        student_log_probs = log_probs(pair.student, batch)
        reward = REWARD(teacher_log_probs, student_log_probs)
        (-(reward * student_log_probs).sum() / pair.num_tokens).backward()
        pair.finish()

    return update


def trl_full(pair: Pair) -> Update:
    """The loss of TRL's `DistillationTrainer`, which is its reverse KL by default."""
    loss_of = trl_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    heads = [m.causal_lm.get_output_embeddings().weight for m in (pair.student, pair.teacher)]

    def update() -> None:
        batch = Padded.of(pair)
        student_hidden = batch.hidden_states(pair.student)
        with torch.no_grad():
            teacher_hidden = batch.hidden_states(pair.teacher)
        with pair.student.autocast():
            loss, _, _ = loss_of(
                student_hidden, teacher_hidden, *heads, batch.trained, 1.0, pair.num_tokens
            )
        loss.backward()
        pair.finish()

    return update


def trl_trainer(pair: Pair) -> Update:
    """TRL's own trainer, which is its full-vocabulary reverse KL: its loss, and our AdamW."""
    return _by_trainer(pair, trl_module("trl").DistillationTrainer)


def trl_adapter(pair: Pair) -> Update:
    """The same trainer with our adapter and the sampled reward."""
    trainer_class = trl_module("poweropd.integrations.trl").PowerOPDTrainer
    return _by_trainer(pair, trainer_class, reward="log_ratio")


def trl_adapter_full(pair: Pair) -> Update:
    """The same trainer with our adapter and the expectation of the reward."""
    trainer_class = trl_module("poweropd.integrations.trl").PowerOPDTrainer
    return _by_trainer(pair, trainer_class, reward="log_ratio", full_vocabulary=True)


def _by_trainer(pair: Pair, trainer_class: Any, **options: Any) -> Update:
    from datasets import Dataset

    trainer = trainer_class(
        model=pair.student.causal_lm,
        teacher_model=pair.teacher.causal_lm,
        args=trl_config(Path(mkdtemp()), pair.geometry.dtype),
        processing_class=AutoTokenizer.from_pretrained(embedded.path("student")),
        train_dataset=Dataset.from_list([{"prompt": "1 + 1 ="}]),
        **options,
    )
    count = torch.tensor(pair.num_tokens)

    def update() -> None:
        batch = Padded.of(pair)
        prompt = pair.geometry.prompt
        inputs = {
            "prompt_ids": batch.ids[:, :prompt],
            "prompt_mask": batch.mask[:, :prompt],
            "completion_ids": batch.targets,
            "completion_mask": batch.trained.long(),
        }
        with trainer.compute_loss_context_manager():
            loss = trainer._compute_loss(trainer.model, inputs, count)[0]
        loss.backward()
        pair.finish()

    return update


PATHS: dict[str, Callable[[Pair], Update]] = {
    "ours": ours,
    "ours-full": ours_full,
    "naive": naive,
    "trl-logprob": trl_logprob,
    "trl-full": trl_full,
    "trl-trainer": trl_trainer,
    "trl-adapter": trl_adapter,
    "trl-adapter-full": trl_adapter_full,
}

# (geometry, lengths) -> (path, other path, what) -> the largest ratio that is good enough.
Comparison = tuple[str, str, str]
GOALS: dict[tuple[str, str], dict[Comparison, float]] = {
    ("small", "fixed"): {
        ("ours", "naive", "cpu_seconds"): 0.70,
        ("ours", "trl-logprob", "cpu_seconds"): 0.75,
        ("ours", "naive", "peak_bytes"): 0.30,
        ("ours-full", "trl-full", "cpu_seconds"): 0.70,
        ("trl-adapter", "trl-trainer", "cpu_seconds"): 1.0,
        ("trl-adapter", "trl-trainer", "peak_bytes"): 1.0,
        ("trl-adapter-full", "trl-trainer", "cpu_seconds"): 1.0,
        ("trl-adapter-full", "trl-trainer", "peak_bytes"): 1.0,
    },
    ("small", "ragged"): {
        ("ours", "naive", "cpu_seconds"): 0.60,
        ("ours-full", "trl-full", "cpu_seconds"): 0.60,
    },
}


def run(path: str, geometry: Geometry, lengths: str, updates: int) -> Cost | str:
    """What an update costs in this process, or why there is none."""
    try:
        return measure(PATHS[path](Pair.build(geometry, lengths)), updates)
    except Unavailable as error:
        return str(error)
    except torch.OutOfMemoryError:
        return "out of memory"


def matmul_ceiling(dtype: str) -> float:
    """Operations a second of a large square matmul, the best of ten: a CPU second on a CPU."""
    size = 1024 if dtype == "float32" else 256  # few CPUs have fast matmuls of other dtypes
    if CUDA:
        size = 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch_dtype(dtype)) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b)) for _ in range(10))


def update_flops(geometry: Geometry, lengths: Sequence[int]) -> float:
    """One forward of the teacher, three of the student, both heads at trained tokens."""
    sequences = [geometry.prompt + length for length in lengths]
    student, teacher = geometry.student, geometry.teacher
    body = sum(teacher.body_flops(s) + 3 * student.body_flops(s) for s in sequences)
    return body + 2 * sum(lengths) * geometry.vocab * (teacher.hidden + 3 * student.hidden)


def summary(cost: Cost, tokens: int, flops: float, ceiling: float) -> dict[str, float]:
    busy = cost.wall_seconds if CUDA else cost.cpu_seconds
    return asdict(cost) | {
        "tokens_per_second": tokens / cost.wall_seconds,
        "matmul_share": flops / busy / ceiling,
    }


def print_costs(
    costs: Mapping[str, Sequence[Cost]], summaries: Mapping[str, Mapping[str, float]]
) -> None:
    header = ["path", "CPU s", "wall s", "peak GB", "tokens/s", "of matmul ceiling"]
    beside = ["CPU / ours", "peak / ours"] if "ours" in costs else []
    rows = []
    for path, s in summaries.items():
        cells = [f"{s['cpu_seconds']:.3f}", f"{s['wall_seconds']:.3f}"]
        cells += [f"{s['peak_bytes'] / 1e9:.2f}", f"{s['tokens_per_second']:.0f}"]
        cells += [f"{s['matmul_share']:.0%}"]
        if beside:
            cells += [
                f"{ratio(costs, path, 'ours', what):.2f}" for what in ("cpu_seconds", "peak_bytes")
            ]
        rows.append([path, *cells])
    print_table(header + beside, rows)


def print_goals(costs: Mapping[str, Sequence[Cost]], goals: Mapping[Comparison, float]) -> None:
    rows = []
    for (path, other, what), goal in goals.items():
        if path in costs and other in costs:
            found = ratio(costs, path, other, what)
            verdict = "met" if found <= goal else "MISSED"
            rows.append([f"{path} / {other}", what, f"{found:.2f}", f"{goal:.2f}", verdict])
    if rows:
        print()
        print_table(["ratio", "of", "measured", "goal", ""], rows)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, LENGTHS)
    parser.add_argument("--updates", type=int, default=2, help="timed ones in each process")
    parser.add_argument("--max-tokens", type=int, help="of a micro-batch of ours")
    parser.add_argument("--dtype", choices=DTYPES, help="of computing")
    return parsed(parser, PATHS)


def main() -> None:
    arguments = parse()
    given = {name: vars(arguments)[name] for name in ("batch", "max_tokens", "dtype")}
    changes = {name: value for name, value in given.items() if value is not None}
    geometry = replace(GEOMETRIES[arguments.geometry], **changes)
    lengths = geometry.lengths(arguments.lengths)
    print(f"{machine()}, {arguments.threads} threads")
    print(f"{arguments.geometry}, {geometry.dtype}, completions of {sorted(lengths)}\n")

    torch.set_num_threads(arguments.threads)
    ceiling = matmul_ceiling(geometry.dtype)
    further = geometry, arguments.lengths, arguments.updates
    costs, skipped = measure_in_turns(arguments, run, *further)
    flops = update_flops(geometry, lengths)
    summaries = {
        path: summary(Cost.median(found), sum(lengths), flops, ceiling)
        for path, found in costs.items()
    }
    print_costs(costs, summaries)
    print(f"\n{flops / 1e12:.3g} TFLOP an update; ceiling {ceiling / 1e12:.3g} TFLOP/s")
    for path, reason in skipped.items():
        print(f"{path} was skipped: {reason}")
    if not changes:
        print_goals(costs, GOALS.get((arguments.geometry, arguments.lengths), {}))
    if arguments.json:
        found = {"machine": machine(), "flops": flops, "ceiling_flops_per_second": ceiling}
        settings = {"geometry": asdict(geometry), "lengths": lengths, "threads": arguments.threads}
        found |= {"settings": settings, "paths": summaries, "skipped": skipped}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
