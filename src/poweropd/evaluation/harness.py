"""EleutherAI's lm-eval on a model: tasks with data, prompts and graders of their own.

The library does all of it; here its tasks are checked before the model is loaded, and its figures
are shown as ours are. It is the extra `harness`.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch
from rich.table import Table

from poweropd.errors import RunError, UsageError, one_line, shown
from poweropd.evaluation.settings import BATCH_SIZE, HarnessSettings
from poweropd.models import loading
from poweropd.runs.files import write_json
from poweropd.terminal import make_console

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

#: lm-eval marks tasks that run what a model wrote; its metric asks for this variable as well.
_CONSENT = "HF_ALLOW_CODE_EVAL"
_CONSENT_OPTION = "--confirm-run-unsafe-code"
_STDERR = "_stderr"
_NORMAL = 1.96  # standard errors on either side of a 95% interval


class HarnessMetric(TypedDict):
    """One figure of a task; without a standard error if lm-eval gives none."""

    value: float
    stderr: NotRequired[float]


class HarnessTask(TypedDict):
    """The figures of a task, by the metric and, after a comma, the filter of completions."""

    samples: int | None
    version: str | None
    metrics: dict[str, HarnessMetric]


@dataclass(frozen=True)
class HarnessReport:
    """What lm-eval measured: the tasks and groups by name."""

    model: str
    lm_eval: str  # its version
    settings: HarnessSettings
    tasks: dict[str, HarnessTask]

    def to_dict(self) -> dict[str, object]:
        """Returns the content of the JSON file."""
        settings = asdict(self.settings) | {"folder": str(self.settings.folder or "") or None}
        about = {"lm_eval": self.lm_eval, "settings": settings, "tasks": self.tasks}
        return {"model": self.model, "harness": about}


def evaluate_with_harness(
    model: str,
    settings: HarnessSettings,
    dtype: str,
    trust_remote_code: bool = False,
    batch_size: int = BATCH_SIZE,
) -> HarnessReport:
    """Runs tasks of lm-eval on a model; raises UsageError for a task that cannot be run."""
    if find_spec("lm_eval") is None:
        raise UsageError("--harness needs lm-eval: pip install 'poweropd[harness]'")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=_tasks_folder(settings.folder))
    _check_tasks(manager, settings)
    tokenizer = loading.load_tokenizer(model, trust_remote_code)
    if settings.chat_template and not tokenizer.chat_template:
        raise UsageError(f"{model}: it has no chat template; add --no-chat-template")
    loaded = loading.load_model(model, dtype, trust_remote_code)
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    found = lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=loaded,
            tokenizer=tokenizer,
            batch_size=batch_size,
            chat_template_args={"enable_thinking": settings.thinking},
        ),
        tasks=list(settings.tasks),
        task_manager=manager,
        limit=settings.limit,
        apply_chat_template=settings.chat_template,
        system_instruction=settings.system,
        confirm_run_unsafe_code=settings.unsafe,
        log_samples=False,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )
    if found is None:
        raise RunError("--harness: lm-eval gave no results in this process")
    return HarnessReport(model, lm_eval.__version__, settings, dict(_measured(found)))


def _tasks_folder(folder: Path | None) -> str | None:
    """Returns the folder as lm-eval takes it; raises UsageError if it has no task."""
    if folder is not None and not any(folder.rglob("*.yaml")):
        raise UsageError(f"--harness-tasks {folder}: expected a folder with YAML files of tasks")
    return None if folder is None else str(folder)


def _check_tasks(manager: "TaskManager", settings: HarnessSettings) -> None:
    """Loads every task with its data; raises UsageError, in one line, for one that cannot be run.

    lm-eval and what it loads raise errors of many kinds, and the command ends with any of them.
    """
    if settings.unsafe:
        os.environ[_CONSENT] = "1"
    for name in settings.tasks:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.all_tasks, 3)
            hint = f" (perhaps {', '.join(near)})" if near else ""
            raise UsageError(
                f"--harness: lm-eval has no task {shown(name)}{hint}; `lm-eval ls tasks` lists "
                "them, and --harness-tasks names a folder of your own"
            )
        try:
            tasks = manager.load([name])["tasks"].values()
        except Exception as error:
            if not settings.unsafe and _CONSENT in str(error):
                raise UsageError(_consent(name)) from error
            reason = one_line(f"{type(error).__name__}: {error}")[:300]
            raise UsageError(
                f"--harness {name}: the task or its data cannot be loaded, which may need the "
                f"network or a package: {reason}"
            ) from error
        if not settings.unsafe and any(task.config.unsafe_code for task in tasks):
            raise UsageError(_consent(name))


def _consent(name: str) -> str:
    return (
        f"--harness {name}: it runs code that the model writes on this machine, with your rights: "
        f"do so where nothing can be harmed, and say {_CONSENT_OPTION}"
    )


def _measured(
    found: Mapping[str, Mapping[str, Mapping[str, object]]],
) -> Iterator[tuple[str, HarnessTask]]:
    """Yields the name and the figures of each task and group that lm-eval has results of."""
    samples, versions = found.get("n-samples", {}), found.get("versions", {})
    for name, values in found["results"].items():
        metrics = {
            key: metric
            for key, value in values.items()
            if "," in key and _STDERR not in key and (metric := _with_stderr(value, values, key))
        }
        if metrics:
            count = samples.get(name, {}).get("effective")
            version = versions.get(name)
            yield (
                name,
                {
                    "samples": count if isinstance(count, int) else None,
                    "version": None if version is None else str(version),
                    "metrics": metrics,
                },
            )


def _with_stderr(value: object, values: Mapping[str, object], key: str) -> HarnessMetric | None:
    """Returns a figure with its standard error; None if it is no number."""
    number = _as_float(value)
    if number is None:
        return None
    name, _, filtered = key.partition(",")
    stderr = _as_float(values.get(f"{name}{_STDERR},{filtered}"))
    return {"value": number} if stderr is None else {"value": number, "stderr": stderr}


def _as_float(value: object) -> float | None:
    """Returns a number as a float; lm-eval writes N/A where it has none."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def show_harness(report: HarnessReport, json_file: Path | None) -> None:
    """Prints the table of a report and writes its JSON file."""
    table = Table(title=f"{report.model}, lm-eval {report.lm_eval}")
    for column in ("task", "metric", "value", "standard error", "95%"):
        table.add_column(column, justify="right" if column not in ("task", "metric") else "left")
    for name, task in report.tasks.items():
        title = name if task["samples"] is None else f"{name}\n{task['samples']} problems"
        for key, metric in task["metrics"].items():
            value, stderr = metric["value"], metric.get("stderr")
            ends = ("", "")
            if stderr is not None:
                low, high = value - _NORMAL * stderr, value + _NORMAL * stderr
                ends = (f"{stderr:.4f}", f"[{low:.4f}, {high:.4f}]")
            table.add_row(title, key.removesuffix(",none"), f"{value:.4f}", *ends)
            title = ""
    console = make_console()
    console.print(table)
    if json_file is not None:
        write_json(json_file, report.to_dict())
        console.print(f"figures: {json_file}", soft_wrap=True)
