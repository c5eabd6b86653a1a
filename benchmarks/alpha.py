"""Which share of a student's tokens trains at which alpha of power, before a recipe is trained.

    python benchmarks/alpha.py                      # the embedded pair
    python benchmarks/alpha.py recipe.yaml --batches 1 rollout.max_new_tokens=64

One table: the tokens whose reward is exactly 0, which train nothing, and those whose reward is
larger than 0.01. The student samples one completion of each prompt, at its start.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import machine, print_table

from poweropd import Config, rewards
from poweropd.config.shipped import shipped_recipe
from poweropd.training.gradient_noise import PROMPTS, fresh_batches
from poweropd.training.trainer import Trainer

ALPHAS = (0.1, 0.5, 1, 5, 10, 50, 100, 500)
LARGE = 0.01


def cells(teacher: torch.Tensor, student: torch.Tensor, alpha: float) -> list[str]:
    """Of one alpha, from the log-probs of the sampled tokens: share of zeros, share of large."""
    reward = rewards.create("power", alpha=alpha)(teacher, student)
    shares = (reward == 0).float().mean(), (reward.abs() > LARGE).float().mean()
    return [f"{share:.1%}" for share in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=shipped_recipe("demo.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=8, help=f"of {PROMPTS} prompts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as out:
        overrides = [*arguments.overrides, f"run.dir={out}/run", "train.steps=1"]
        trainer = Trainer(Config.load(arguments.recipe, overrides), progress=False)
        examples = [one for batch in fresh_batches(trainer, arguments.batches) for one in batch]
        student = torch.cat([torch.tensor(row) for row in trainer.student_log_probs(examples)])
    teacher = torch.cat([e.teacher_log_probs for e in examples if e.teacher_log_probs is not None])
    print(f"{machine()}; {len(examples)} completions, {len(student):,} tokens")
    quantiles = student.exp().quantile(torch.tensor([0.1, 0.25, 0.5])).tolist()
    print(
        "student's probability of its tokens: "
        + ", ".join(
            f"{share} below {p:.3f}"
            for share, p in zip(("10%", "25%", "50%"), quantiles, strict=True)
        )
    )
    rows = [[f"{alpha:g}", *cells(teacher, student, alpha)] for alpha in ALPHAS]
    print_table(["alpha", "reward 0", f"|reward| > {LARGE}"], rows)


if __name__ == "__main__":
    main()
