"""`poweropd eval`: measures a model, or grades completions from elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from poweropd.errors import UsageError
from poweropd.evaluation.settings import BATCH_SIZE, EvaluationSettings


def eval_command(
    model: Annotated[
        str | None, typer.Argument(help="A model directory, a Hub model, or embedded:student.")
    ] = None,
    benchmark: Annotated[
        str, typer.Option(help="Names, JSONL files or Hub datasets, separated by commas.")
    ] = "",
    n: Annotated[
        int, typer.Option(min=1, help="Completions of each problem.")
    ] = EvaluationSettings.n,
    k: Annotated[int | None, typer.Option(min=1, help="Of Avg@k and Pass@k; n if absent.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder with NAME.jsonl, instead of the Hub.")
    ] = None,
    problem: Annotated[str | None, typer.Option(help="Column of one's own data.")] = None,
    answer: Annotated[str | None, typer.Option(help="Column of one's own data.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of one's own Hub dataset.")] = None,
    temperature: Annotated[float, typer.Option(min=0)] = EvaluationSettings.temperature,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = EvaluationSettings.top_p,
    top_k: Annotated[
        int, typer.Option(min=0, help="0: the whole vocabulary.")
    ] = EvaluationSettings.top_k,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = EvaluationSettings.max_new_tokens,
    seed: Annotated[int, typer.Option(min=0)] = EvaluationSettings.seed,
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
    selection = command.ChosenBenchmarks(names, limit, data, columns)
    if grade is not None and model is not None:
        raise UsageError(f"expected a MODEL or --grade FILE, got both: {model} and {grade}")
    if grade is not None:
        report = command.grade_file(grade, selection if names else None, k)
        command.show_results(report, json_file, compare)
        return
    if model is None:
        raise UsageError("expected a MODEL to evaluate, or --grade FILE")
    if k is not None and k > n:
        raise UsageError(f"--k: expected at most --n={n} completions, got {k}")
    settings = EvaluationSettings(
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
    report = command.evaluate_model(
        model, selection, settings, folder, dtype, trust_remote_code, k, batch_size
    )
    command.show_results(report, json_file, compare)
