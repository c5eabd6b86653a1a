"""`poweropd.evaluate`: measures a model from Python, as `poweropd eval` does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poweropd.errors import UsageError
from poweropd.evaluation import command
from poweropd.evaluation.metrics import Summary
from poweropd.evaluation.settings import BATCH_SIZE, EvaluationSettings
from poweropd.models import AUTO_DTYPE


def evaluate(
    model: str | Path,
    benchmarks: Sequence[str],
    *,
    n: int = EvaluationSettings.n,
    limit: int | None = None,
    grader: str = EvaluationSettings.grader,
    problem_column: str | None = None,
    answer_column: str | None = None,
    folder: str | Path | None = None,
    dtype: str = AUTO_DTYPE,
    batch_size: int = BATCH_SIZE,
    trust_remote_code: bool = False,
    **settings: Any,
) -> dict[str, Summary]:
    """Samples and grades benchmarks; returns name -> figures with intervals over problems.

    model: a directory, a Hub model or embedded:student.
    benchmarks: known names, files or Hub datasets, whose columns may be named.
    n: completions of each problem; limit: problems of each benchmark, the first ones.
    folder: where completions are kept, from which the same call goes on; runs/eval/MODEL without.
    settings: further ones of `EvaluationSettings`, such as temperature, max_new_tokens, system.

    Raises UsageError, one line, for what cannot be evaluated.
    """
    unknown = settings.keys() - vars(EvaluationSettings())
    if unknown:
        known = ", ".join(vars(EvaluationSettings()))
        raise UsageError(f"evaluate: unknown setting {min(unknown)!r} (known: {known})")
    named = command.named_grader(grader)
    asked = EvaluationSettings(n=n, grader=grader, **settings)
    columns = {"problem_column": problem_column, "answer_column": answer_column}
    problems = command.chosen_problems(list(benchmarks), None, limit, columns, named)
    place = (
        Path(folder) if folder is not None else Path("runs/eval") / command.file_name(str(model))
    )
    report = command.evaluate_model(
        str(model), problems, asked, named, place, dtype, trust_remote_code, None, batch_size
    )
    return dict(report.results)
