"""`poweropd eval`: measures a model, or grades completions from elsewhere."""

from pathlib import Path
from typing import Annotated, Any

import typer

from poweropd.errors import UsageError
from poweropd.evaluation.settings import (
    BATCH_SIZE,
    DivergenceSettings,
    EvaluationSettings,
    HarnessSettings,
)

Model = Annotated[
    str | None, typer.Argument(help="A model directory, a Hub model, or embedded:student.")
]
BenchmarkNames = Annotated[
    str, typer.Option(help="Names, files or Hub datasets, separated by commas.")
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Completions for each problem (8) or prompt (1).")
]
At = Annotated[
    int | None, typer.Option(min=1, help="The k of Avg@k and Pass@k (default: the value of --n).")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Evaluate only this many first problems.")]
Data = Annotated[
    Path | None, typer.Option(help="A folder with NAME.jsonl, read instead of the Hub.")
]
ProblemColumn = Annotated[str | None, typer.Option(help="The problem column of your own data.")]
AnswerColumn = Annotated[str | None, typer.Option(help="The answer column of your own data.")]
Split = Annotated[str | None, typer.Option(help="The split of your own Hub dataset or folder.")]
DatasetConfig = Annotated[
    str | None, typer.Option("--config", help="The config of your own Hub dataset.")
]
Revision = Annotated[
    str | None, typer.Option(help="A branch, tag or commit of your own Hub dataset.")
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="Sampling temperature (0.6; with --prompts 1); 0 is greedy."),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Sample from the fewest tokens with this probability (0.95)."),
]
TopK = Annotated[
    int | None, typer.Option(min=0, help="Sample from this many tokens (20); 0 means all of them.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest completion in tokens (4096; --prompts 1024).")
]
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
TeacherName = Annotated[
    str | None, typer.Option(help="With --prompts: the teacher, or its name on --teacher-server.")
]
TeacherServer = Annotated[
    str, typer.Option(help="Base URLs of vLLM servers with the teacher, separated by commas.")
]
TeacherTokenizer = Annotated[
    str | None, typer.Option(help="With --teacher-server: where the teacher's tokenizer is.")
]
Prompts = Annotated[
    str | None, typer.Option(help="Measure the divergence from --teacher on these prompts.")
]
GradeFile = Annotated[
    Path | None, typer.Option(help="Grade the completions of this file instead of a model's.")
]


Harness = Annotated[
    str, typer.Option(help="Tasks of EleutherAI's lm-eval, separated by commas, such as ifeval.")
]
HarnessTasks = Annotated[
    Path | None, typer.Option(help="A folder with YAML files of lm-eval tasks of your own.")
]
Unsafe = Annotated[
    bool,
    typer.Option(
        "--confirm-run-unsafe-code",
        help="Let tasks of lm-eval run code that the model writes, on this machine.",
    ),
]


def eval_command(
    model: Model = None,
    benchmark: BenchmarkNames = "",
    n: Samples = None,
    k: At = None,
    limit: Limit = None,
    data: Data = None,
    problem: ProblemColumn = None,
    answer: AnswerColumn = None,
    split: Split = None,
    config: DatasetConfig = None,
    revision: Revision = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = EvaluationSettings.seed,
    thinking: Thinking = False,
    chat_template: ChatTemplate = True,
    system: System = None,
    instruction: Instruction = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = BATCH_SIZE,
    trust_remote_code: TrustRemoteCode = False,
    out: Out = None,
    json_file: JsonFile = None,
    compare: Compare = None,
    grader: GraderOption = EvaluationSettings.grader,
    grade: GradeFile = None,
    harness: Harness = "",
    harness_tasks: HarnessTasks = None,
    confirm_run_unsafe_code: Unsafe = False,
    teacher: TeacherName = None,
    teacher_server: TeacherServer = "",
    teacher_tokenizer: TeacherTokenizer = None,
    prompts: Prompts = None,
) -> None:
    """Measures a model on benchmarks, or how far it is from a teacher, with 95% intervals."""
    from poweropd.models import places

    if model is not None:  # before torch is imported
        places.resolve(model)
    from poweropd.evaluation import command

    names = _between_commas(benchmark)
    if harness or harness_tasks:
        if model is None or names or grade is not None or compare is not None:
            raise UsageError(
                "--harness: expected a MODEL, without --benchmark, --grade and --compare"
            )
        asked = HarnessSettings(
            tuple(_between_commas(harness)), harness_tasks, limit, chat_template, thinking, system,
            seed, confirm_run_unsafe_code,
        )  # fmt: skip
        _run_harness(model, asked, dtype, trust_remote_code, batch_size, json_file)
        return
    columns = {"problem_column": problem, "answer_column": answer, "split": split}
    columns |= {"config": config, "revision": revision}
    own_grader = command.named_grader(grader)
    chosen = (names, data, limit, columns, own_grader)
    chat: dict[str, object] | None = {"enable_thinking": thinking} if chat_template else None
    sampling = {"n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    truncation = {"top_p": top_p, "top_k": top_k}
    if grade is not None:
        if model is not None:
            raise UsageError(f"expected a MODEL or --grade FILE, got both: {model} and {grade}")
        problems = command.chosen_problems(*chosen)
        report = command.grade_file(grade, problems, own_grader, answer, k)
        command.show_report(report, json_file, compare)
        return
    if model is None:
        raise UsageError("expected a MODEL to evaluate, or --grade FILE")
    folder = out or Path("runs/eval") / command.file_name(model)
    if teacher is not None or teacher_server or prompts is not None:
        from poweropd.evaluation import divergence_command

        refused: dict[str, object] = {"--benchmark": benchmark, "--data": data, "--k": k}
        refused |= {"--answer": answer, "--instruction": instruction}
        refused |= {"--top-p": top_p, "--top-k": top_k}
        divergence_command.check_options(teacher, prompts, refused)
        measured = divergence_command.measure_divergence(
            model,
            divergence_command.teacher_section(
                teacher, teacher_server, teacher_tokenizer, dtype, trust_remote_code
            ),
            divergence_command.prompts_section(
                prompts,
                {"column": problem, "split": split, "config": config, "revision": revision},
                chat,
                system,
            ),
            DivergenceSettings(**given(sampling)),
            out or command.judged_folder(folder, str(teacher), str(prompts)),
            divergence_command.ModelOptions(dtype, trust_remote_code, batch_size),
            limit,
        )
        divergence_command.show_divergence(measured, json_file, compare)
        return
    settings = EvaluationSettings(
        **given(sampling | truncation),
        chat=chat,
        system=system,
        instruction=instruction,
        grader=grader,
    )
    if k is not None and k > settings.n:
        raise UsageError(f"--k: expected at most --n={settings.n} completions, got {k}")
    problems = command.chosen_problems(*chosen)
    report = command.evaluate_model(
        model, problems, settings, own_grader, folder, dtype, trust_remote_code, k, batch_size
    )
    command.show_report(report, json_file, compare)


def _between_commas(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _run_harness(
    model: str,
    asked: HarnessSettings,
    dtype: str,
    trust_remote_code: bool,
    batch_size: int,
    json_file: Path | None,
) -> None:
    """Runs tasks of lm-eval in place of benchmarks."""
    from poweropd.evaluation import harness

    if not asked.tasks:
        raise UsageError("--harness: expected names of tasks of lm-eval, such as ifeval")
    found = harness.evaluate_with_harness(model, asked, dtype, trust_remote_code, batch_size)
    harness.show_harness(found, json_file)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that were given; the others have defaults of their own."""
    return {name: value for name, value in options.items() if value is not None}
