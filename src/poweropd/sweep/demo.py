"""`poweropd demo`: a sweep over three rewards from the same start on the same prompts.

Vanilla (log ratio), clip and power train the embedded student with two seeds each, at one learning
rate chosen beforehand on the development split (docs/lab-notes.md). Then all models solve the same
evaluation problems. Besides accuracy it shows what an optimizer feels: the signal-to-noise ratio of
each reward's gradient, and its cosine to the exact full-vocabulary gradient.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from poweropd.config.shipped import shipped_recipe
from poweropd.evaluation.metrics import GradedRow, paired_bootstrap, problem_values
from poweropd.report import figures, planes
from poweropd.runs.files import JsonObject, read_jsonl, write_json
from poweropd.sweep import cells, command, runner
from poweropd.sweep.jobs import Job, Measurement, ShippedModel, Training, solving
from poweropd.terminal import make_console

REWARDS = ("log_ratio", "clip", "power")
BASELINE = "log_ratio"
COMPARED = (("power", BASELINE), ("clip", BASELINE), ("power", "clip"))
SEEDS = 2
PARALLEL = 2
THREADS = 1  # of each process, since these models are too small for two
LINE_SECONDS = 10.0

CURVE_POINTS = 3  # after the start, at which a run's accuracy and gradients are measured
CURVE_PROBLEMS = 128
START_BATCHES = 32  # of fresh rollouts, for gradient quality at the start
CURVE_BATCHES = 16  # and later


@dataclass(frozen=True)
class DemoFigures:
    """The figures of the demo, as demo.json holds them."""

    problems: int
    before: dict[str, float]  # of the student as it is shipped
    teacher: dict[str, float]
    runs: list["DemoRun"]
    differences: list[dict[str, str | float]]  # of accuracies; mean, low and high over problems


@dataclass(frozen=True)
class DemoRun:
    """The figures of one training of the demo."""

    reward: str
    seed: int
    accuracy: float
    mean_length: float  # tokens of a completion
    median_grad_norm: float
    gradient_snr: float  # at the start
    gradient_cosine: float  # at the start
    seconds: float  # of all steps and measurements


def measurements(steps: int, problems: int) -> list[Measurement]:
    """Returns what is measured of a training: its curve and, at the end, all problems."""
    few = min(CURVE_PROBLEMS, problems)
    at = {steps * part // CURVE_POINTS for part in range(1, CURVE_POINTS + 1)} - {0}
    start = Measurement(0, START_BATCHES, cosine=True, problems=few)  # of the same model in all
    later = [Measurement(step, CURVE_BATCHES, problems=few) for step in sorted(at)]
    return [start, *later, Measurement(steps, problems=problems)]


def run_demo(out: Path, steps: int | None, num_problems: int, json_file: Path | None) -> int:
    """Runs the demo, prints its table, writes its picture and numbers; returns the exit status.

    Raises RunError if a job failed.
    """
    console, started = make_console(), time.perf_counter()
    overrides = [] if steps is None else [f"train.steps={steps}"]
    trainings = cells.trainings(
        recipe=shipped_recipe("demo.yaml"),
        overrides=overrides,
        over=[f"reward.name={','.join(REWARDS)}"],
        case=[],
        seeds=SEEDS,
        out=out,
        measure=lambda steps: measurements(steps, num_problems),
    )
    trainings.sort(key=lambda training: training.seed)
    settings = solving(trainings[0].config)
    models = [
        ShippedModel(name, out / "eval" / name, num_problems, settings)
        for name in ("student", "teacher")
    ]
    jobs: list[Job] = [*models, *trainings]
    with runner.only_sweep(out) as lock:
        runner.claim(out, trainings, {"problems": num_problems})
        outcome = runner.JobRunner(jobs, PARALLEL, lock, THREADS, LINE_SECONDS).run()
    if outcome.unfinished:
        return command.exit_status(out, outcome, len(jobs))
    found = DemoFigures(
        problems=num_problems,
        before=models[0].figures(),
        teacher=models[1].figures(),
        runs=[run_figures(training) for training in trainings],
        differences=differences([(one.cell, solved(one)) for one in trainings]),
    )
    save_picture(trainings, out / "demo.png")
    json_file = json_file or out / "demo.json"
    for path in {out / "demo.json", json_file}:
        write_json(path, asdict(found))
    console.print(demo_table(found))
    console.print(
        f"{time.perf_counter() - started:.0f} s in all\nrun directories: {out}/REWARD-seedN\n"
        f"picture: {out / 'demo.png'}\nnumbers: {json_file}",
        soft_wrap=True,
    )
    return 0


def run_figures(training: Training) -> DemoRun:
    """Returns the figures of a finished training."""
    metrics, points = training.directory.metrics(), training.points()
    first, last = points[training.measurements[0]], points[training.measurements[-1]]
    seconds = [row["seconds/step"] for row in metrics] + [one["seconds"] for one in points.values()]
    return DemoRun(
        reward=training.cell,
        seed=training.seed,
        accuracy=last["accuracy"],
        mean_length=last["mean_length"],
        median_grad_norm=statistics.median(row["grad_norm"] for row in metrics),
        gradient_snr=first["gradient_snr"],
        gradient_cosine=first["gradient_cosine"],
        seconds=round(sum(seconds), 1),
    )


def solved(training: Training) -> dict[str, float]:
    """Returns 1 or 0 for each problem that the trained student solved or did not, by id."""
    path = training.completions_path(training.measurements[-1])
    rows: Sequence[GradedRow] = read_jsonl(path)  # type: ignore[assignment]
    return problem_values(rows)


def differences(found: Sequence[tuple[str, dict[str, float]]]) -> list[dict[str, str | float]]:
    """Returns differences of accuracy, paired by problem and averaged over seeds.

    `found`: the reward and the solved problems of each training.
    """
    means = {}
    for reward in REWARDS:
        seeds = [problems for name, problems in found if name == reward]
        means[reward] = {id: statistics.fmean(one[id] for one in seeds) for id in seeds[0]}
    return [
        {
            "reward": reward,
            "against": against,
            **asdict(paired_bootstrap(means[reward], means[against])),
        }
        for reward, against in COMPARED
    ]


def save_picture(trainings: Sequence[Training], path: Path) -> None:
    """Draws what was measured on the way of the trainings, and every step's lowest reward."""
    points, steps = list[JsonObject](), list[JsonObject]()
    for training in trainings:
        names: dict[str, str | float] = {"reward": training.cell, "seed": training.seed}
        curve = {m.step: found for m, found in training.points().items() if m.batches}
        points += [{**names, "step": step, **found} for step, found in curve.items()]
        rows = training.directory.metrics()
        steps += [{**names, "step": row["step"], "lowest": row["reward/min"]} for row in rows]
    settings = {one.cell: one.config.reward.model_dump() for one in trainings}
    bounds = planes.bounds_of([*settings.values()])
    figures.save_demo(points, steps, settings, bounds, path)


def demo_table(found: DemoFigures) -> Table:
    """Returns the figures for a terminal: one line for each model, means over seeds.

    It is at most 80 columns wide.
    """
    result = Table(title=f"Accuracy on {found.problems} problems, temperature 0.6")
    result.add_column("")
    for column in ("accuracy\n(seeds)", "minus vanilla\n[95%]", "length", "SNR", "cosine"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, row in (("student before", found.before), ("teacher", found.teacher)):
        result.add_row(name, f"{row['accuracy']:.3f}", "", f"{row['mean_length']:.1f}", "", "")
    against = {one["reward"]: one for one in found.differences if one["against"] == BASELINE}
    difference = "{mean:+.3f}\n[{low:+.3f}, {high:+.3f}]"
    for reward in REWARDS:
        runs = [run for run in found.runs if run.reward == reward]
        accuracies = [run.accuracy for run in runs]
        result.add_row(
            f"after {reward}",
            f"{statistics.fmean(accuracies):.3f}\n({', '.join(f'{a:.3f}' for a in accuracies)})",
            difference.format(**against[reward]) if reward in against else "",
            f"{statistics.fmean(run.mean_length for run in runs):.1f}",
            f"{statistics.fmean(run.gradient_snr for run in runs):.2f}",
            f"{statistics.fmean(run.gradient_cosine for run in runs):.2f}",
        )
    result.caption = (
        "SNR: signal-to-noise ratio of the reward's gradient at the start.\n"
        "Cosine: of a batch's gradient to the exact, full-vocabulary one."
    )
    return result
