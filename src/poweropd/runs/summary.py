"""What a run has reached, in lines for people: its evaluations, and what to do with its student."""

import shlex
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from poweropd import embedded
from poweropd.config import Config
from poweropd.config.benchmarks import BenchmarkConfig
from poweropd.config.evaluate import HELD_OUT, EvaluateConfig
from poweropd.embedded import EMBEDDED_PREFIX
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import OF_BENCHMARKS, OF_DIVERGENCE, Metric, Shown

#: Keys of a recipe that are left out of a command where they have their defaults.
PLACES = {"column", "split", "config", "revision"}
SAMPLING = {"grader", "max_new_tokens", "temperature", "top_p", "top_k"}
PROMPTS = 200  # of the command that compares the student with its teacher


def evaluation_lines(run: RunDirectory, step: int) -> list[str]:
    """Returns a line for each figure of the evaluation at this step, behind that of step 0.

    For example "tickets 41.2 -> 77.5 [71.0, 83.5] (teacher 88.0)", in percent.
    """
    before, teacher = run.evaluation(0) if step else {}, run.teacher_evaluation()
    lines = []
    for name, found in run.evaluation(step).items():
        for key, shown in _printed(OF_BENCHMARKS):
            figure = _with_start(shown, found[key], before.get(name, {}).get(key))
            goal = f" (teacher {shown.text(teacher[name][key]['mean'])})" if name in teacher else ""
            lines.append(f"{name} {figure}{goal}")
    divergence, start = run.divergence(step), run.divergence(0) if step else {}
    for key, shown in _printed(OF_DIVERGENCE):
        if key in divergence:
            figure = _with_start(shown, divergence[key], start.get(key))
            lines.append(f"{shown.heading} {figure}")
    return lines


def teacher_lines(run: RunDirectory) -> list[str]:
    """Returns a line for each benchmark on which the teacher itself was evaluated."""
    return [
        f"{name} {_with_start(shown, found[key], None)}"
        for name, found in run.teacher_evaluation().items()
        for key, shown in _printed(OF_BENCHMARKS)
    ]


def _printed(metrics: Mapping[str, Metric]) -> Iterator[tuple[str, Shown]]:
    """Yields the names of the metrics that training prints, with how it does."""
    return ((key, m.progress) for key, m in metrics.items() if m.progress is not None)


def _with_start(shown: Shown, now: JsonObject, start: JsonObject | None) -> str:
    """Returns an estimate with its interval, behind the mean at the start if that is known."""
    text = f"{shown.text(now['mean'])} [{shown.text(now['low'])}, {shown.text(now['high'])}]"
    return text if start is None else f"{shown.text(start['mean'])} -> {text}"


def legend(run: RunDirectory, step: int) -> str:
    """Returns how the lines of an evaluation are read."""
    words = ["before training -> now [95% interval]"] if run.evaluation_folder(0).exists() else []
    if run.evaluation(step):
        words.append("benchmarks: Avg@k in percent")
    for name, metric in OF_DIVERGENCE.items():
        if metric.progress is not None and name in run.divergence(step):
            words.append(f"{name}: {metric.heading}, {metric.better} is better")
    return f"evaluations ({'; '.join(words)}):"


def closing_lines(run: RunDirectory, config: Config, step: int) -> list[str]:
    """Returns what a finished run of `step` steps has reached, where things are, and what next."""
    final, best = str(run.final), run.best()
    places = {"student": final, "log": str(run.log_path)}
    if best is not None and best.step != step:
        places["best"] = f"{run.best_student} (step {best.step}, by {best.metric})"
    commands = {
        "serve": _serving(config, run, final),
        "evaluate": ["poweropd", "eval", final, *_evaluating(config)],
        "report": ["poweropd", "report", str(run.path)],
        "push": ["poweropd", "push", str(run.path), f"me/{run.path.name}", "--dry-run"],
    }
    return [
        f"done: {step} steps",
        *(f"  {line}" for line in evaluation_lines(run, step)),
        *(f"  {what + ':':<10}{where}" for what, where in places.items()),
        "next:",
        *(f"  {what + ':':<10}{shlex.join(words)}" for what, words in commands.items()),
    ]


def _serving(config: Config, run: RunDirectory, final: str) -> list[str]:
    """Returns the command that serves the student, an adapter beside its base model."""
    lora, base = config.model.lora, config.model.student
    if find_spec("vllm") is None:
        return ["transformers", "serve", final]
    if lora is None or lora.merge:
        return ["vllm", "serve", final]
    if base.startswith(EMBEDDED_PREFIX):
        base = str(embedded.path(base.removeprefix(EMBEDDED_PREFIX)))
    adapter = [f"--lora-modules={run.path.name}={final}", f"--max-lora-rank={lora.r}"]
    return ["vllm", "serve", base, "--enable-lora", *adapter]


def _evaluating(config: Config) -> list[str]:
    """Returns the arguments of `poweropd eval`: the recipe's first benchmark, or its teacher."""
    section, data = config.evaluate, config.data
    words = [f"--dtype={config.model.dtype}"]
    words += ["--no-chat-template"] if data.chat is None else []
    words += ["--thinking"] if (data.chat or {}).get("enable_thinking") else []
    words += [f"--system={data.system}"] if data.system else []
    words += ["--trust-remote-code"] if config.model.trust_remote_code else []
    words += [f"--seed={config.train.seed}"] if config.train.seed else []
    if section is not None and section.benchmarks:
        return words + _as_options(_on_first_benchmark(section))
    if list(config.teachers) != [""] or config.self_teacher is not None:
        return [*words, "--benchmark=math500"]
    return words + _as_options(_beside_teacher(config))


def _as_options(values: Mapping[str, object]) -> list[str]:
    """Returns values as options of a command, without those that are absent."""
    return [
        f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None
    ]


def _beside_teacher(config: Config) -> dict[str, object]:
    """Returns the options that compare the student with the recipe's only teacher."""
    data, teacher = config.data, config.only_teacher
    own = config.evaluate.divergence if config.evaluate is not None else None
    source = own.prompts if own is not None and own.prompts != HELD_OUT else data.prompts
    places = data.model_dump(include=PLACES, exclude_defaults=True)
    return {
        "teacher": teacher.model,
        "teacher-server": ",".join(teacher.servers) or None,
        "teacher-tokenizer": teacher.tokenizer,
        "prompts": source,
        "problem": places.pop("column", None),
        **places,
        "limit": PROMPTS,
        "max-new-tokens": config.rollout.longest,
    }


def _on_first_benchmark(section: EvaluateConfig) -> dict[str, object]:
    """Returns the options that name the recipe's first benchmark and how it is asked."""
    entry = section.benchmarks[0]
    own = BenchmarkConfig.model_construct(name=entry) if isinstance(entry, str) else entry
    sampling = section.model_dump(include=SAMPLING, exclude_defaults=True)
    places = own.model_dump(exclude={"name", "file", "dataset"}, exclude_none=True)
    return {
        "benchmark": own.file or own.dataset or own.name,
        "data": section.data_dir,
        "n": section.n,
        "limit": section.limit,
        **sampling,
        **places,
    }
