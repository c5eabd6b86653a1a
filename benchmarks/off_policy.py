"""How old completions may be, and whose: the embedded pair after 200 steps, by accuracy.

    python benchmarks/off_policy.py [--seeds 2] [--arms stale]

Arms differ in what samples the completions: the student's weights of n steps ago, or for a share of
them the teacher, once, into a file with its log-probs. Accuracy is on 1,024 held-out problems, one
completion each, at temperature 1. One thread.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import machine, print_table

from poweropd import Config
from poweropd.config.shipped import shipped_recipe
from poweropd.data.rollout import Request, Rollout
from poweropd.models import loading
from poweropd.models.language_model import Student
from poweropd.rollouts.base import Sampling, completion_seed
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.training.build import RunInputs
from poweropd.training.trainer import Trainer

PROMPTS = 1024
FILE = "completions.jsonl"
OWN = {"staleness": 0}
ARMS: dict[str, dict[str, Any]] = {
    "the student's own": OWN,
    **{
        f"stale by {n}, weights {weights}": {"staleness": n, "correction": weights}
        for n in (1, 4)
        for weights in ("none", "truncated")
    },
    **{
        f"{share:.0%} the teacher's, weights {weights}": {"share": share, "weights": weights}
        for share in (0.25, 1.0)
        for weights in ("none", "truncated")
    },
}


class Beside:
    """Samples from a copy of the student, so also beside an update."""

    concurrent = True

    def __init__(self, student: Student, config: Config, tokenizer: Any) -> None:
        self.student = student
        self.model = type(student.model)(student.model.config).eval()
        self.engine = TransformersEngine(self.model, vocab_size=student.vocab_size)

    def sync(self) -> None:
        self.model.load_state_dict(self.student.model.state_dict())

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        return self.engine.generate(requests, sampling)


def config_of(arm: dict[str, Any], seed: int, folder: Path) -> Config:
    tree = Config.load(shipped_recipe("embedded.yaml")).model_dump()
    tree["run"] = {"dir": str(folder / "run")}
    tree["data"] |= {"limit": PROMPTS}
    tree["train"] |= {"seed": seed}
    tree["evaluate"] |= {"every": tree["train"]["steps"], "limit": 1024, "before": False}
    tree["evaluate"] |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    tree["checkpoint"] |= {"every": 1000}
    if "share" in arm:
        tree["rollout"]["off_policy"] = {**arm, "file": str(folder.parent / FILE)}
    else:
        engine = "off_policy:Beside" if arm["staleness"] else "transformers"
        tree["rollout"] |= {**arm, "engine": engine}
    return Config.from_dict(tree)


def write_completions(path: Path) -> None:
    """Writes one completion of each prompt by the teacher, with its log-probs."""
    config = config_of(OWN, 0, path.parent)
    inputs = RunInputs.load(config, notify=False)
    model = loading.load_model(config.only_teacher.model, "float32")
    engine = TransformersEngine(model, vocab_size=model.get_output_embeddings().weight.shape[0])
    requests = [
        Request(prompt, number, 0, completion_seed(7, 0, number, 0))
        for number, prompt in enumerate(inputs.prompts)
    ]
    with path.open("w") as file:
        for rollout in engine.generate(requests, Sampling(config.rollout.longest, inputs.stop_ids)):
            row = {
                "row": rollout.request.prompt.index,
                "completion_ids": rollout.completion_ids,
                "sampling_log_probs": rollout.sampling_log_probs,
            }
            file.write(json.dumps(row) + "\n")


def train(arm: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """Returns what a run ended with: accuracy, and the means of its steps' sampler metrics."""
    trainer = Trainer(config_of(arm, seed, folder), progress=False)
    trainer.train()
    rows = trainer.run.metrics()
    keys = ("sampler/mean_abs_difference", "sampler/effective_sample_size")
    keys += ("off_policy/mean_weight",)
    found = {key: [row[key] for row in rows if key in row] for key in keys}
    means = {key: sum(values) / len(values) for key, values in found.items() if values}
    return means | {"accuracy": rows[-1]["eval/embedded/avg_at_k"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", default="", help="only those whose names hold this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, table = time.process_time(), []
    with TemporaryDirectory() as temporary:
        write_completions(Path(temporary) / FILE)
        for number, (name, arm) in enumerate(ARMS.items()):
            if arguments.arms not in name:
                continue
            found = []
            for seed in range(arguments.seeds):
                folder = Path(temporary) / f"{number}-{seed}"
                folder.mkdir()
                found.append(train(arm, seed, folder))
            accuracies = [one["accuracy"] for one in found]
            others = {key: one for key, one in found[0].items() if key != "accuracy"}
            shown = ", ".join(f"{key.partition('/')[2]} {v:.3f}" for key, v in others.items())
            mean = sum(accuracies) / len(accuracies)
            each = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
            table.append([name, f"{mean:.3f}", each, shown])
            print(table[-1], flush=True)
    print(machine())
    print_table(["completions", "accuracy", "by seed", "of seed 0"], table)
    print(f"{time.process_time() - start:.0f} CPU seconds")


if __name__ == "__main__":
    main()
