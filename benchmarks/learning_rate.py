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

from poweropd.sweep.demo import REWARDS, SEEDS, STEPS, Job, measure_accuracy, start_process
from poweropd.training.trainer import Trainer


def accuracy(job: Job) -> float:
    trainer = Trainer(job.config(), progress=False)
    trainer.train()
    folder = trainer.run.evaluations / "development"
    found = measure_accuracy(trainer.subject(), job.num_problems, folder, "development")
    return float(found["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="1e-5,2e-5,5e-5,1e-4")
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    rates = [float(rate) for rate in arguments.rates.split(",")]
    with (
        TemporaryDirectory() as out,
        ProcessPoolExecutor(2, get_context("spawn"), initializer=start_process) as pool,
    ):
        jobs = {
            (rate, reward): [
                pool.submit(
                    accuracy,
                    Job(
                        reward,
                        seed,
                        arguments.steps,
                        arguments.problems,
                        Path(out, str(rate)),
                        rate,
                    ),
                )
                for seed in SEEDS
            ]
            for rate in rates
            for reward in REWARDS
        }
        print("rate    ", *(f"{reward:>16}" for reward in REWARDS), "    mean")
        for rate in rates:
            found = [[job.result() for job in jobs[rate, reward]] for reward in REWARDS]
            cells = [" / ".join(f"{value:.3f}" for value in seeds) for seeds in found]
            mean = statistics.fmean(statistics.fmean(seeds) for seeds in found)
            print(f"{rate:<8g}", *(f"{cell:>16}" for cell in cells), f"{mean:8.3f}", flush=True)


if __name__ == "__main__":
    main()
