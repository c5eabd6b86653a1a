"""`poweropd demo`: three rewards from the same start on the same prompts, compared honestly.

Vanilla (log ratio), clip and power train the embedded student with two seeds each, at one learning
rate chosen beforehand on the development split (docs/lab-notes.md). Then all models solve the same
evaluation problems. Besides accuracy it shows what an optimizer feels: the signal-to-noise ratio of
each reward's gradient, and its cosine to the exact full-vocabulary gradient.
"""

import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from poweropd.config import Config
from poweropd.embedded import task
from poweropd.errors import RunError, UsageError
from poweropd.evaluation import runner
from poweropd.evaluation.benchmarks import Problem
from poweropd.evaluation.metrics import paired_bootstrap, problem_values
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.grading.grader import Grader
from poweropd.report import figures
from poweropd.runs import files
from poweropd.runs.files import write_json
from poweropd.training import gradient_noise
from poweropd.training.trainer import Trainer

REWARDS: dict[str, dict[str, Any]] = {
    "log_ratio": {"name": "log_ratio"},
    "clip": {"name": "clip"},
    "power": {"name": "power", "alpha": 500.0},  # the best of the paper
}
BASELINE = "log_ratio"
SEEDS = (0, 1)
PROCESSES = 2

STEPS = 200
PROMPTS_PER_STEP = 4
LEARNING_RATE = 2e-5
MAX_NEW_TOKENS = 64
SETTINGS = EvaluationSettings(n=1, max_new_tokens=MAX_NEW_TOKENS, top_p=1.0, top_k=0)

CURVE_POINTS = 3  # after the start, at which a run's accuracy and gradients are measured
CURVE_PROBLEMS = 128
START_BATCHES = 32  # of fresh rollouts, for gradient quality at the start
CURVE_BATCHES = 16  # and later


@dataclass(frozen=True)
class Job:
    """One training of the demo."""

    reward: str
    seed: int
    steps: int
    num_problems: int
    out: Path
    learning_rate: float = LEARNING_RATE

    def config(self) -> Config:
        return Config.from_dict(
            {
                "run": {"dir": str(self.out / f"{self.reward}-seed{self.seed}")},
                "model": {"student": "embedded:student", "dtype": "float32"},
                "teacher": {"model": "embedded:teacher", "dtype": "float32"},
                "data": {"prompts": "embedded:train"},
                "rollout": {"max_new_tokens": MAX_NEW_TOKENS},
                "reward": REWARDS[self.reward],
                "train": {
                    "steps": self.steps,
                    "prompts_per_step": PROMPTS_PER_STEP,
                    "learning_rate": self.learning_rate,
                    "seed": self.seed,
                },
            }
        )


def run_demo(out: Path, steps: int | None, num_problems: int, json_file: Path | None) -> None:
    """Runs the demo, prints its table, writes its picture and numbers."""
    console, started = Console(), time.perf_counter()
    jobs = [Job(r, seed, steps or STEPS, num_problems, out) for seed in SEEDS for r in REWARDS]
    pool = ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=start_process)
    with pool, Progress(console=console, transient=True) as progress:
        fixed = [pool.submit(solve, name, num_problems, out) for name in ("student", "teacher")]
        trainings = [pool.submit(train_job, job) for job in jobs]
        bar = progress.add_task("training and evaluating", total=len(jobs))
        for training in as_completed(trainings):
            done = _result(training, pool)
            console.print(
                f"{done['reward']}, seed {done['seed']}: {done['accuracy']:.3f} right after "
                f"{jobs[0].steps} steps, {done['seconds']:.0f} s"
            )
            progress.advance(bar)
        before, teacher = (solving.result() for solving in fixed)
        runs = [training.result() for training in trainings]
    numbers = demo_summary(before, teacher, runs)
    picture = out / "demo.png"
    points, steps_taken = ([row for run in runs for row in run[key]] for key in ("points", "steps"))
    figures.save_demo(points, steps_taken, picture)
    for path in {out / "demo.json", json_file or out / "demo.json"}:
        write_json(path, numbers)
    console.print(demo_table(numbers))
    console.print(
        f"{time.perf_counter() - started:.0f} s in all\nrun directories: {out}/REWARD-seedN\n"
        f"picture: {picture}\nnumbers: {json_file or out / 'demo.json'}",
        soft_wrap=True,
    )


def _result(training: "Future[dict[str, Any]]", pool: ProcessPoolExecutor) -> dict[str, Any]:
    """A training's result; if it failed, the others that have not begun are dropped."""
    try:
        return training.result()
    except UsageError as error:
        pool.shutdown(wait=False, cancel_futures=True)
        raise UsageError(f"{error} (of poweropd demo: --out chooses another folder)") from None
    except (RunError, KeyboardInterrupt):
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def start_process() -> None:
    """One thread a process: these models are too small for two."""
    torch.set_num_threads(1)
    logging.getLogger("poweropd").setLevel(logging.ERROR)


def solve(name: str, num_problems: int, out: Path) -> dict[str, Any]:
    """Accuracy of an embedded model as it is shipped."""
    started = time.perf_counter()
    subject = runner.load_subject(f"embedded:{name}", "float32")
    return {
        **measure_accuracy(subject, num_problems, out / "eval" / name),
        "seconds": _since(started),
    }


def measure_accuracy(
    subject: runner.Subject,
    num_problems: int,
    folder: Path,
    split: task.Split = "evaluation",
) -> dict[str, Any]:
    """How many of a split's problems a model solves, and which."""
    problems = [Problem(p.id, p.problem, p.answer) for p in task.problems(split, num_problems)]
    evaluation = runner.Evaluation(split, problems, SETTINGS, folder, subject.identity)
    with Grader() as grader:
        evaluation.run(subject, grader, progress=False)
    solved = problem_values(evaluation.rows)
    return {
        "accuracy": statistics.fmean(solved.values()),
        "mean_length": statistics.fmean(row["tokens"] for row in evaluation.rows),
        "solved": solved,
    }


def train_job(job: Job) -> dict[str, Any]:
    """One training, measured on its way. Interrupted, it goes on; finished, it is not repeated."""
    started = time.perf_counter()
    trainer = Trainer(job.config(), progress=False)
    path = trainer.run.path / "points.jsonl"
    measured = {point["step"] for point in files.recover_jsonl(path)}
    for part in range(CURVE_POINTS + 1):
        step = job.steps * part // CURVE_POINTS
        if trainer.train(until=step).interrupted_by is not None:
            raise RunError("interrupted; the same command goes on from here")
        if step not in measured:
            with path.open("a") as file:
                file.write(json.dumps(measure_point(trainer, job)) + "\n")
            measured.add(step)
    rows, points = trainer.run.metrics(), files.read_jsonl(path)
    return {
        "reward": job.reward,
        "seed": job.seed,
        **measure_accuracy(
            trainer.subject(), job.num_problems, trainer.run.evaluations_path / "final"
        ),
        "median_grad_norm": statistics.median(row["grad_norm"] for row in rows),
        "gradient_snr": points[0]["gradient_snr"],
        "gradient_cosine": points[0]["gradient_cosine"],
        "seconds": _since(started),
        "points": points,
        "steps": [
            {"reward": job.reward, "seed": job.seed, "step": r["step"], "lowest": r["reward/min"]}
            for r in rows
        ],
    }


def measure_point(trainer: Trainer, job: Job) -> dict[str, Any]:
    """A run at one of its steps: accuracy on a few problems, quality of its reward's gradient."""
    step = trainer.steps_done
    folder = trainer.run.evaluation_folder(step)
    solving = measure_accuracy(trainer.subject(), min(CURVE_PROBLEMS, job.num_problems), folder)
    start = step == 0  # where all runs are the same model
    quality = gradient_noise.measure_gradient(
        trainer, START_BATCHES if start else CURVE_BATCHES, start
    )
    return {
        "reward": job.reward,
        "seed": job.seed,
        "step": step,
        "accuracy": solving["accuracy"],
        **quality,
    }


def demo_summary(
    before: Mapping[str, Any], teacher: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The numbers of the demo. Differences are paired by problem and averaged over seeds."""
    solved = {}
    for reward in REWARDS:
        seeds = [run["solved"] for run in runs if run["reward"] == reward]
        solved[reward] = {id: statistics.fmean(s[id] for s in seeds) for id in seeds[0]}
    differences = []
    for reward, against in [("power", BASELINE), ("clip", BASELINE), ("power", "clip")]:
        estimate = paired_bootstrap(solved[reward], solved[against])
        differences.append({"reward": reward, "against": against, **asdict(estimate)})
    shown = (
        "reward", "seed", "accuracy", "mean_length", "median_grad_norm",
        "gradient_snr", "gradient_cosine", "seconds",
    )  # fmt: skip
    return {
        "problems": len(before["solved"]),
        "before": {"accuracy": before["accuracy"], "mean_length": before["mean_length"]},
        "teacher": {"accuracy": teacher["accuracy"], "mean_length": teacher["mean_length"]},
        "runs": [{key: run[key] for key in shown} for run in runs],
        "differences": differences,
    }


def demo_table(numbers: Mapping[str, Any]) -> Table:
    """The numbers for a terminal: one row a reward, means over seeds; 80 columns wide."""
    against = {d["reward"]: d for d in numbers["differences"] if d["against"] == BASELINE}
    result = Table(title=f"Accuracy on {numbers['problems']} problems, temperature 0.6")
    result.add_column("")
    for column in ("accuracy\n(seeds)", "minus vanilla\n[95%]", "length", "SNR", "cosine"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, key in (("student before", "before"), ("teacher", "teacher")):
        row = numbers[key]
        result.add_row(name, f"{row['accuracy']:.3f}", "", f"{row['mean_length']:.1f}", "", "")
    for reward in REWARDS:
        runs = [run for run in numbers["runs"] if run["reward"] == reward]
        means = {
            key: statistics.fmean(run[key] for run in runs) for key in runs[0].keys() - {"reward"}
        }
        seeds = ", ".join(f"{run['accuracy']:.3f}" for run in runs)
        difference = "{mean:+.3f}\n[{low:+.3f}, {high:+.3f}]"
        result.add_row(
            f"after {reward}",
            f"{means['accuracy']:.3f}\n({seeds})",
            difference.format(**against[reward]) if reward in against else "",
            f"{means['mean_length']:.1f}",
            f"{means['gradient_snr']:.2f}",
            f"{means['gradient_cosine']:.2f}",
        )
    result.caption = (
        "SNR: signal-to-noise ratio of the reward's gradient at the start.\n"
        "Cosine: of a batch's gradient to the exact, full-vocabulary one."
    )
    return result


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)
