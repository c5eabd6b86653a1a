"""How the demo's learning rate was chosen: accuracy on the development split, by rate and reward.

    python benchmarks/learning_rate.py [--rates 1e-5,2e-5,5e-5,1e-4] [--problems 512]

Prints one row a rate. Two processes, one thread each.
"""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from poweropd import Config, Trainer
from poweropd.config.shipped import shipped_recipe
from poweropd.embedded import task
from poweropd.evaluation.benchmarks import Problem
from poweropd.sweep import cells
from poweropd.sweep.demo import REWARDS, SEEDS
from poweropd.sweep.jobs import solving
from poweropd.sweep.process import solve


def accuracy(config: Config, count: int) -> float:
    torch.set_num_threads(1)
    trainer = Trainer(config, progress=False)
    trainer.train()
    problems = [Problem(p.id, p.problem, p.answer) for p in task.problems("development", count)]
    path = trainer.run.evaluations / "development.jsonl"
    return solve(trainer.subject(), problems, solving(config), path)["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="1e-5,2e-5,5e-5,1e-4")
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    with (
        TemporaryDirectory() as out,
        ProcessPoolExecutor(2, get_context("spawn")) as pool,
    ):
        trainings = cells.trainings(
            recipe=shipped_recipe("demo.yaml"),
            overrides=[f"train.steps={arguments.steps}"],
            over=[f"train.learning_rate={arguments.rates}", f"reward.name={','.join(REWARDS)}"],
            case=[],
            seeds=SEEDS,
            out=Path(out),
            measure=lambda steps: [],
        )
        jobs = {
            (one.config.train.learning_rate, one.config.reward.name, one.seed): pool.submit(
                accuracy, one.config, arguments.problems
            )
            for one in trainings
        }
        print("rate    ", *(f"{reward:>16}" for reward in REWARDS), "    mean")
        for rate in dict.fromkeys(rate for rate, _, _ in jobs):
            found = [
                [job.result() for (*at, _), job in jobs.items() if at == [rate, reward]]
                for reward in REWARDS
            ]
            texts = [" / ".join(f"{value:.3f}" for value in seeds) for seeds in found]
            mean = statistics.fmean(statistics.fmean(seeds) for seeds in found)
            print(f"{rate:<8g}", *(f"{text:>16}" for text in texts), f"{mean:8.3f}", flush=True)


if __name__ == "__main__":
    main()
