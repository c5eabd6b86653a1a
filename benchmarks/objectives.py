"""How much of each objective's gradient is signal, on the embedded pair at its start.

    python benchmarks/objectives.py [--batches 32]
    python benchmarks/objectives.py --projected     # the plain objective, by less than a gradient

Every objective sees the same rollouts: batches of 32 completions of the shipped student. A cell is
the signal-to-noise ratio of a batch's gradient, |E g|^2 / tr Cov g, and its mean cosine to the
exact gradient of the same reward, over the vocabulary and all batches. One thread.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory

import torch
from common import machine, print_table

from poweropd import Config, rewards
from poweropd.config.shipped import shipped_recipe
from poweropd.data.rollout import Example
from poweropd.models.language_model import Teacher
from poweropd.objectives.base import Objective
from poweropd.objectives.full_vocab import FullVocab
from poweropd.objectives.sampled import Sampled
from poweropd.objectives.selection import Dial, Random, Selected
from poweropd.rewards import Reward
from poweropd.sweep.demo import BASELINE
from poweropd.training.gradient_noise import (
    BUCKETS,
    Flatten,
    concatenated,
    fresh_batches,
    gradients,
    mean_cosine,
    projected,
    signal_to_noise,
)
from poweropd.training.trainer import Trainer
from poweropd.training.update import Updater

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
    updater: Updater, teacher: Teacher, batches: Sequence[Sequence[Example]], reward: Reward
) -> list[str]:
    """Of one reward: "SNR (cosine)" of every objective."""
    found = {
        name: gradients(updater.with_objective(objective, teacher), batches, reward, concatenated)
        for name, objective in objectives(teacher).items()
    }
    exact = found["full_vocab"].mean(0)
    return [f"{signal_to_noise(g):.2f} ({mean_cosine(g, exact):.2f})" for g in found.values()]


def vectors() -> dict[str, Flatten]:
    """What the ratio can be measured on: all of a gradient, projections of it, the head's alone."""
    sizes = {f"{size:,} numbers": size for size in (BUCKETS, 4096, 256)}
    return {
        "whole gradient": concatenated,
        **{name: partial(projected, buckets=size) for name, size in sizes.items()},
        "embedding and head": lambda gradient: concatenated([next(iter(gradient))]),
    }


def ratios(updater: Updater, batches: Sequence[Sequence[Example]], reward: Reward) -> list[str]:
    """Of one reward: the SNR of the plain objective, by each kind of vector."""
    return [
        f"{signal_to_noise(gradients(updater, batches, reward, flatten)):.3f}"
        for flatten in vectors().values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--projected", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as out:
        overrides = [f"reward={{name: {BASELINE}}}", "train.steps=1", f"run.dir={out}/run"]
        config = Config.load(shipped_recipe("demo.yaml"), overrides)
        trainer = Trainer(config, progress=False)
        batches = fresh_batches(trainer, arguments.batches)
        teacher, updater = trainer.models.teacher, trainer.updater
        print(f"{machine()}; {arguments.batches} batches")
        if arguments.projected:
            rows = [[name, *ratios(updater, batches, reward)] for name, reward in REWARDS.items()]
            print_table(["reward, SNR", *vectors()], rows)
            return
        rows = [
            [name, *cells(updater, teacher, batches, reward)] for name, reward in REWARDS.items()
        ]
        print_table(["reward, SNR (cosine)", *objectives(teacher)], rows)


if __name__ == "__main__":
    main()
