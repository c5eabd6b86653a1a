"""`poweropd eval`: measures a model, or grades completions from elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from poweropd.errors import UsageError
from poweropd.evaluation.settings import BATCH_SIZE, EvaluationSettings

Model = Annotated[
    str | None, typer.Argument(help="A model directory, a Hub model, or embedded:student.")
]
BenchmarkNames = Annotated[
    str, typer.Option(help="Names, JSONL files or Hub datasets, separated by commas.")
]
Samples = Annotated[int, typer.Option(min=1, help="Completions for each problem.")]
At = Annotated[
    int | None, typer.Option(min=1, help="The k of Avg@k and Pass@k (default: the value of --n).")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Evaluate only this many first problems.")]
Data = Annotated[
    Path | None, typer.Option(help="A folder with NAME.jsonl, read instead of the Hub.")
]
ProblemColumn = Annotated[str | None, typer.Option(help="The problem column of your own data.")]
AnswerColumn = Annotated[str | None, typer.Option(help="The answer column of your own data.")]
Split = Annotated[str | None, typer.Option(help="The split of your own Hub dataset.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="Sample from the fewest tokens with this probability.")
]
TopK = Annotated[
    int, typer.Option(min=0, help="Sample from this many tokens; 0 means all of them.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest completion in tokens.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]
Thinking = Annotated[bool, typer.Option(help="Set enable_thinking of the chat template.")]
ChatTemplate = Annotated[
    bool, typer.Option(help="Give problems through the chat template, or as plain text.")
]
System = Annotated[str | None, typer.Option(help="Text of a system turn.")]
Instruction = Annotated[str | None, typer.Option(help="Text appended to every problem.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Completions sampled at once.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
GraderOption = Annotated[
    str,
    typer.Option(
        help="How completions are graded: math, exact, contains, choice, regex:PATTERN, json, "
        "json:KEY,KEY, or your own package.module:function."
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="The folder of the completions (default: runs/eval/MODEL).")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Compare = Annotated[
    Path | None, typer.Option(help="Compare with this file, which --json wrote for another model.")
]
GradeFile = Annotated[
    Path | None, typer.Option(help="Grade the completions of this file instead of a model's.")
]


def eval_command(
    model: Model = None,
    benchmark: BenchmarkNames = "",
    n: Samples = EvaluationSettings.n,
    k: At = None,
    limit: Limit = None,
    data: Data = None,
    problem: ProblemColumn = None,
    answer: AnswerColumn = None,
    split: Split = None,
    temperature: Temperature = EvaluationSettings.temperature,
    top_p: TopP = EvaluationSettings.top_p,
    top_k: TopK = EvaluationSettings.top_k,
    max_new_tokens: MaxNewTokens = EvaluationSettings.max_new_tokens,
    seed: Seed = EvaluationSettings.seed,
    thinking: Thinking = False,
    chat_template: ChatTemplate = True,
    system: System = None,
    instruction: Instruction = None,
    dtype: Dtype = "bfloat16",
    batch_size: BatchSize = BATCH_SIZE,
    trust_remote_code: TrustRemoteCode = False,
    out: Out = None,
    json_file: JsonFile = None,
    compare: Compare = None,
    grader: GraderOption = EvaluationSettings.grader,
    grade: GradeFile = None,
) -> None:
    """Measures a model on benchmarks: Avg@k, Pass@k, length, with 95% intervals over problems."""
    from poweropd.evaluation import command
    from poweropd.models import places

    if model is not None:
        places.resolve(model)
    names = [name.strip() for name in benchmark.split(",") if name.strip()]
    columns = {"problem_column": problem, "answer_column": answer, "split": split}
    own_grader = command.named_grader(grader)
    chosen = (names, data, limit, columns, own_grader)
    if grade is not None:
        if model is not None:
            raise UsageError(f"expected a MODEL or --grade FILE, got both: {model} and {grade}")
        problems = command.chosen_problems(*chosen)
        report = command.grade_file(grade, problems, own_grader, answer, k)
    elif model is None:
        raise UsageError("expected a MODEL to evaluate, or --grade FILE")
    elif k is not None and k > n:
        raise UsageError(f"--k: expected at most --n={n} completions, got {k}")
    else:
        chat = {"enable_thinking": thinking} if chat_template else None
        settings = EvaluationSettings(
            n, max_new_tokens, temperature, top_p, top_k, seed, chat, system, instruction, grader
        )
        folder = out or Path("runs/eval") / model.strip("/").replace("/", "--").replace(":", "-")
        problems = command.chosen_problems(*chosen)
        report = command.evaluate_model(
            model, problems, settings, own_grader, folder, dtype, trust_remote_code, k, batch_size
        )
    command.show_report(report, json_file, compare)
