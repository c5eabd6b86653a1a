"""How much of each objective's gradient is signal, on the embedded pair at its start.

    python benchmarks/objectives.py [--batches 32]

Every objective sees the same rollouts: batches of 32 completions of the shipped student. A cell is
the signal-to-noise ratio of a batch's gradient, |E g|^2 / tr Cov g, and its mean cosine to the
exact gradient of the same reward, over the vocabulary and all batches. One thread.
"""

import argparse
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch
from common import machine, print_table

from poweropd import Config, rewards
from poweropd.data.batch import Batch
from poweropd.models.language_model import Student, Teacher
from poweropd.objectives.base import Objective
from poweropd.objectives.full_vocab import FullVocab
from poweropd.objectives.sampled import Sampled
from poweropd.objectives.selection import Dial, Random, Selected
from poweropd.rewards import Reward
from poweropd.sweep.demo import BASELINE, shipped_recipe
from poweropd.training.gradient_noise import fresh_batches, gradients, mean_cosine, signal_to_noise
from poweropd.training.trainer import Trainer
from poweropd.training.update import with_teacher

KEEP = 0.4
REWARDS: dict[str, Reward] = {
    "log_ratio": rewards.create("log_ratio"),
    "clip": rewards.create("clip"),
    "tanh": rewards.create("tanh"),
    **{f"power, alpha {a}": rewards.create("power", alpha=float(a)) for a in (1, 5, 50, 500)},
}


def objectives(teacher: Teacher) -> dict[str, Objective]:
    head = teacher.head()
    return {
        "plain": Sampled(),
        "value baseline": Sampled(head, baseline=True),
        "DIAL": Selected(Sampled(), Dial(KEEP, beta=1.0)),
        "random": Selected(Sampled(), Random(KEEP)),
        "full_vocab": FullVocab(head),
    }


def cells(
    student: Student, teacher: Teacher, batches: Sequence[Batch], reward: Reward
) -> list[str]:
    """Of one reward: "SNR (cosine)" of every objective."""
    found = {
        name: gradients(student, batches, objective, reward)
        for name, objective in objectives(teacher).items()
    }
    exact = found["full_vocab"].mean(0)
    return [f"{signal_to_noise(g):.2f} ({mean_cosine(g, exact):.2f})" for g in found.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as out:
        overrides = [f"reward={{name: {BASELINE}}}", "train.steps=1", f"run.dir={out}/run"]
        config = Config.load(shipped_recipe("demo.yaml"), overrides)
        trainer = Trainer(config, progress=False)
        scored = fresh_batches(trainer, arguments.batches)
        teacher = trainer.models.teacher
        batches = [with_teacher(batch, teacher) for batch in scored]
        print(f"{machine()}; {arguments.batches} batches; SNR (cosine)")
        rows = [
            [name, *cells(trainer.student, teacher, batches, reward)]
            for name, reward in REWARDS.items()
        ]
        print_table(["reward", *objectives(teacher)], rows)


if __name__ == "__main__":
    main()
