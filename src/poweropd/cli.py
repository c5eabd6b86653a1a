"""The command line: `poweropd demo | train | eval | report | sweep | plan | push`,
also as `python -m poweropd`.

Exit status: 0 done; 1 the run failed; 2 wrong usage, recipe or input (one line, no traceback);
128 + n stopped by signal n, with a checkpoint written.
"""

import errno
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from poweropd import push
from poweropd.errors import RunError, UsageError
from poweropd.evaluation.settings import BATCH_SIZE, Settings
from poweropd.sweep import options as sweep

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="On-policy distillation of language models with bounded token rewards.",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as reward.alpha=10.")
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")], overrides: Overrides = None
) -> None:
    """Distil the student of a recipe; on an unfinished run directory, go on from its checkpoint."""
    from poweropd.config import Config
    from poweropd.trainer import Trainer

    result = Trainer(Config.load(recipe, overrides or [])).train()
    if result.interrupted_by is not None:
        command = " ".join(["poweropd train", str(recipe), *(overrides or [])])
        typer.echo(f"stopped after step {result.steps}; to go on: {command}", err=True)
        raise typer.Exit(128 + result.interrupted_by)
    typer.echo(f"run directory: {result.run_dir}\nstudent: {result.final}")


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="A model directory, a Hub model, or embedded:student.")
    ] = None,
    benchmark: Annotated[
        str, typer.Option(help="Names, JSONL files or Hub datasets, separated by commas.")
    ] = "",
    n: Annotated[int, typer.Option(min=1, help="Completions of each problem.")] = Settings.n,
    k: Annotated[int | None, typer.Option(min=1, help="Of Avg@k and Pass@k; n if absent.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder with NAME.jsonl, instead of the Hub.")
    ] = None,
    problem: Annotated[str | None, typer.Option(help="Column of one's own data.")] = None,
    answer: Annotated[str | None, typer.Option(help="Column of one's own data.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of one's own Hub dataset.")] = None,
    temperature: Annotated[float, typer.Option(min=0)] = Settings.temperature,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = Settings.top_p,
    top_k: Annotated[int, typer.Option(min=0, help="0: the whole vocabulary.")] = Settings.top_k,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = Settings.max_new_tokens,
    seed: Annotated[int, typer.Option(min=0)] = Settings.seed,
    thinking: Annotated[bool, typer.Option(help="The chat template's enable_thinking.")] = False,
    chat_template: Annotated[bool, typer.Option(help="Off: problems as plain text.")] = True,
    system: Annotated[str | None, typer.Option(help="A system turn.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Appended to every problem.")] = None,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Completions sampled at once.")
    ] = BATCH_SIZE,
    trust_remote_code: Annotated[bool, typer.Option()] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where completions are kept; runs/eval/MODEL if absent.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Figures of another evaluation, from --json.")
    ] = None,
    grade: Annotated[
        Path | None, typer.Option(help="Grade this file's completions instead of a model's.")
    ] = None,
) -> None:
    """Measure a model on benchmarks: Avg@k, Pass@k, length, with 95% intervals over problems."""
    from poweropd.evaluation import command

    names = [name.strip() for name in benchmark.split(",") if name.strip()]
    columns = {"problem_column": problem, "answer_column": answer, "split": split}
    selection = command.Selection(names, limit, data, columns)
    if grade is not None and model is not None:
        raise UsageError(f"expected a MODEL or --grade FILE, got both: {model} and {grade}")
    if grade is not None:
        report = command.grade_file(grade, selection if names else None, k)
        command.show(report, json_file, compare)
        return
    if model is None:
        raise UsageError("expected a MODEL to evaluate, or --grade FILE")
    if k is not None and k > n:
        raise UsageError(f"--k: expected at most --n={n} completions, got {k}")
    settings = Settings(
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        chat={"enable_thinking": thinking} if chat_template else None,
        system=system,
        instruction=instruction,
    )
    folder = out or Path("runs/eval") / model.strip("/").replace("/", "--").replace(":", "-")
    report = command.measure(
        model, selection, settings, folder, dtype, trust_remote_code, k, batch_size
    )
    command.show(report, json_file, compare)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="Whose memory and peak count, such as A100.")] = "H100",
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GiB, instead of its own.")
    ] = None,
    tflops: Annotated[float | None, typer.Option(min=0.001, help="Peak, not its own.")] = None,
    utilization: Annotated[
        float, typer.Option(min=0.01, max=1, help="Of the peak, in scoring and update: a guess.")
    ] = 0.4,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Of rollouts, on one GPU.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="A run directory whose steps say how fast it goes.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Mean.")] = None,
    completion_tokens: Annotated[int | None, typer.Option(min=1, help="Mean; the cap.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="As many as are needed.")] = None,
    compare: Annotated[str, typer.Option(help="Such as sampled,full_vocab.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write it here too.")] = None,
) -> None:
    """Check a recipe and say what it costs, before any weight is loaded."""
    from poweropd.config import Config
    from poweropd.plan import command, table

    options = command.Options(
        gpu=gpu,
        gpu_memory=gpu_memory,
        tflops=tflops,
        utilization=utilization,
        tokens_per_second=tokens_per_second,
        measured=measured,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        gpus=gpus,
        compare=[kind.strip() for kind in compare.split(",") if kind.strip()],
    )
    made = command.make(Config.load(recipe, overrides or []), options)
    table.show(made)
    if json_file is not None:
        made.write(json_file)
    if made.failed:
        raise UsageError("; ".join(f"{check.name}: {check.detail}" for check in made.failed))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where runs, picture and numbers go.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Fewer steps, for a quick look.")] = None,
    problems: Annotated[int, typer.Option(min=16, help="Evaluation problems.")] = 1024,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers here.")
    ] = None,
) -> None:
    """Distil the embedded student with three rewards and compare them, in about four minutes."""
    from poweropd import demo as showcase

    showcase.run(out, steps=steps, num_problems=problems, json_file=json_file)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
) -> None:
    """Show and compare runs, finished or not, on one self-contained HTML page."""
    from poweropd.report import page

    written = page.write(runs, out, png)
    typer.echo(f"report: {written[0]}")
    if png is not None:
        typer.echo(f"{len(written) - 1} figures: {png}")


app.command()(sweep.sweep)
app.command(hidden=True)(sweep.sweep_run)
app.command()(push.push)


def main() -> None:
    """Runs the command line; the user's mistakes are one line and exit status 2."""
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)],
    )
    for library in ("accelerate", "datasets", "httpx2", "httpcore2", "transformers"):
        logging.getLogger(library).setLevel(logging.WARNING)
    sys.path.insert(0, "")  # a user's own module:function lies in the current directory
    try:
        app()
    except UsageError as error:
        sys.exit(_say(error, 2))
    except RunError as error:
        sys.exit(_say(error, 1))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        sys.exit(_say(f"{error.filename or 'a file'}: cannot write: {error.strerror}", 1))


def _say(error: object, status: int) -> int:
    typer.echo(f"error: {error}", err=True)
    return status
