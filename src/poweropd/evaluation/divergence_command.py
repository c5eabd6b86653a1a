"""Does the work of `poweropd eval MODEL --teacher T --prompts FILE`."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from poweropd import stops
from poweropd.config.data import DataConfig
from poweropd.config.teachers import TeacherConfig
from poweropd.data.batch import collate, halved, pack
from poweropd.data.prompts import Prompt, check_ids, check_shared, load_prompts
from poweropd.data.rollout import Example
from poweropd.errors import RunError, UsageError
from poweropd.evaluation.divergence import (
    EXACT,
    Divergence,
    paired_differences,
    summarize_divergence,
)
from poweropd.evaluation.intervals import Estimate
from poweropd.evaluation.judging import (
    DivergenceEvaluation,
    Judge,
    Judges,
    LocalJudge,
    ServedJudge,
    compare_batches,
)
from poweropd.evaluation.runner import Subject
from poweropd.evaluation.settings import DivergenceSettings
from poweropd.models import devices, loading
from poweropd.models.language_model import Student, Teacher
from poweropd.models.vocabulary import Vocabulary, head_rows
from poweropd.net import check_url
from poweropd.objectives.comparison import ComparedTokens
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.runs.files import JsonObject, read_json, write_json
from poweropd.runs.metrics import OF_DIVERGENCE, Shown
from poweropd.teachers.factory import (
    TeacherProfile,
    load_teacher_model,
    profile_teacher,
    unshared_with,
)
from poweropd.terminal import make_console

logger = logging.getLogger("poweropd")

MAX_TOKENS = 16384  # of one forward of the student, with padding; halved if memory is short


@dataclass(frozen=True)
class ModelOptions:
    """How the model under evaluation is loaded and sampled."""

    dtype: str
    trust_remote_code: bool
    batch_size: int  # completions sampled at once


@dataclass(frozen=True)
class DivergenceReport:
    """How far a model is from a teacher, with what the JSON file tells beside."""

    title: str
    divergence: Divergence
    facts: Mapping[str, object]

    def to_dict(self) -> JsonObject:
        """Returns the content of the JSON file."""
        return {**self.facts, **self.divergence.to_dict()}


def check_options(teacher: str | None, prompts: str | None, refused: Mapping[str, object]) -> None:
    """Raises UsageError for options that do not go together; `refused` may not be given."""
    if teacher is None or prompts is None:
        raise UsageError(
            "--prompts, --teacher: the divergence from a teacher needs both, such as --teacher "
            "Qwen/Qwen3-4B --prompts prompts.jsonl"
        )
    if found := [name for name, value in refused.items() if value not in (None, "")]:
        raise UsageError(
            f"{found[0]}: it belongs to benchmarks; with --prompts completions are sampled from "
            "the whole distribution and nothing is graded: leave it out"
        )


def teacher_section(
    name: str | None,
    servers: str,
    tokenizer: str | None,
    dtype: str,
    trust_remote_code: bool,
) -> TeacherConfig:
    """Returns the teacher of the command line; raises UsageError for a wrong address."""
    urls = [url.strip() for url in servers.split(",") if url.strip()]
    try:
        for url in urls:
            check_url("--teacher-server", url)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return TeacherConfig(
        model=str(name),
        servers=urls,
        tokenizer=tokenizer,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


def prompts_section(
    source: str | None,
    places: Mapping[str, str | None],
    chat: dict[str, object] | None,
    system: str | None,
) -> DataConfig:
    """Returns the prompts of the command line; places: column, split, config and revision."""
    given = {key: value for key, value in places.items() if value is not None}
    return DataConfig.model_validate(
        {"prompts": str(source), "chat": chat, "system": system, **given}
    )


class LoneStudent:
    """Compares a model with a teacher in this process alone, within its memory."""

    def __init__(self, student: Student, max_tokens: int = MAX_TOKENS) -> None:
        self.student, self.max_tokens = student, max_tokens

    def __call__(
        self, examples: Sequence[Example], teacher: Teacher | None, stop_ids: Sequence[int]
    ) -> ComparedTokens:
        """Returns the record of the examples' tokens; raises RunError if memory is too short."""
        lengths = [example.student_length for example in examples]
        while True:
            groups = pack(lengths, self.max_tokens)
            batches = [collate([examples[i] for i in group]) for group in groups]
            try:
                return compare_batches(
                    self.student, batches, teacher, stop_ids, self.student.device
                )
            except torch.OutOfMemoryError as error:
                smaller = halved(self.max_tokens, lengths)
                if smaller is None:
                    raise RunError(
                        f"out of memory in scoring a sequence of {max(lengths)} tokens: lower "
                        "--max-new-tokens, or choose a smaller --dtype"
                    ) from error
                self.max_tokens = smaller


def measure_divergence(
    model: str,
    teacher: TeacherConfig,
    data: DataConfig,
    settings: DivergenceSettings,
    folder: Path,
    options: ModelOptions,
    limit: int | None = None,
) -> DivergenceReport:
    """Measures how far a model is from a teacher on prompts, and keeps the rows in `folder`."""
    tokenizer = loading.load_tokenizer(model, options.trust_remote_code)
    profile = profile_teacher(teacher)
    unshared = unshared_with(tokenizer, {"": profile}, notify=True)
    prompts = load_prompts(data, tokenizer, {"": profile.tokenizer})[:limit]
    config = loading.load_config(model, options.trust_remote_code)
    check_ids(prompts, loading.vocab_rows(config), None, "--prompts")
    check_shared(prompts, unshared, tokenizer, "--prompts")
    logger.info("%s beside %s on %d prompts", model, teacher.model, len(prompts))
    context = min(loading.context_length(config), profile.context)
    settings = _within_context(prompts, settings, context)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = loading.load_model(model, options.dtype, options.trust_remote_code).to(device)
    both = (stops.stop_ids(tokenizer, loaded.generation_config), profile.stop_ids)
    own_stops, its_stops = stops.shared_stops(*both, unshared, "semantic", tokenizer)
    identity = f"{loading.fingerprint(model, loaded)} {options.dtype}"
    shared = Vocabulary.shared(head_rows(loaded), tokenizer, unshared)
    judge, student = _judge(loaded, shared, options, teacher, profile, prompts, device)
    engine = TransformersEngine(
        loaded,
        vocab_size=student.vocab_size,
        batch_size=options.batch_size,
        masked_ids=student.masked_ids,
    )
    engine.check_decoding()
    stop_ids = tuple(dict.fromkeys([*own_stops, *its_stops]))
    subject = Subject(engine, tokenizer, stop_ids, context, identity)
    models = {"model": identity, "teacher": f"{teacher.model} {judge.estimate}"}
    evaluation = DivergenceEvaluation(prompts, settings, folder, models)
    rows = evaluation.run(subject, Judges({"": judge}))
    try:
        divergence = summarize_divergence(rows, judge.estimate)
    except ValueError:
        raise RunError(
            f"every completion is empty: check the model, its chat template and its stop tokens "
            f"(the completions are in {evaluation.path})"
        ) from None
    facts = {
        "model": model,
        "teacher": teacher.model,
        "settings": asdict(settings),
        "data": {"prompts": data.prompts, "digest": _digest(prompts)},
        "completions": str(folder),
    }
    return DivergenceReport(f"{model} beside {teacher.model}", divergence, facts)


def _judge(
    loaded: loading.PreTrainedModel,
    shared: Vocabulary,
    options: ModelOptions,
    teacher: TeacherConfig,
    profile: TeacherProfile,
    prompts: Sequence[Prompt],
    device: torch.device,
) -> tuple[Judge, Student]:
    """Returns the teacher as a judge, and the loaded model over the vocabulary that both have."""
    dtype = devices.torch_dtype(options.dtype)
    if profile.server is not None:
        tokens = min(shared.size, len(profile.tokenizer))
        shared = shared.cut(profile.server.vocab_size(shared.size, tokens))
        profile.server.check([prompt.teacher_prompt_ids for prompt in prompts])
        student = Student(loaded, shared.size, dtype, masked_ids=shared.masked)
        return ServedJudge(profile.server, LoneStudent(student)), student
    other = load_teacher_model(teacher, device)
    shared = shared.cut(head_rows(other))
    student = Student(loaded, shared.size, dtype, masked_ids=shared.masked)
    judge = Teacher(other, shared.size, devices.torch_dtype(teacher.dtype), shared.masked)
    return LocalJudge(judge, LoneStudent(student)), student


def _within_context(
    prompts: Sequence[Prompt], settings: DivergenceSettings, context: int
) -> DivergenceSettings:
    """Returns settings whose completions fit beside the longest prompt of both models."""
    lengths = [max(len(p.prompt_ids), len(p.teacher_prompt_ids)) for p in prompts]
    room = context - max(lengths)
    if room < 1:
        raise UsageError(
            f"--prompts: row {prompts[lengths.index(max(lengths))].index}: a prompt of "
            f"{max(lengths)} tokens leaves no room in the models' context of {context} tokens"
        )
    if room < settings.max_new_tokens:
        logger.warning(
            "--prompts: at most %d new tokens instead of %d: the models' context has %d tokens",
            *(room, settings.max_new_tokens, context),
        )
    return replace(settings, max_new_tokens=min(room, settings.max_new_tokens))


def _digest(prompts: Sequence[Prompt]) -> str:
    """Returns what two evaluations on the same rows share, whatever their tokenizers."""
    rows = json.dumps([prompt.row for prompt in prompts], default=str, sort_keys=True)
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def show_divergence(report: DivergenceReport, json_file: Path | None, compare: Path | None) -> None:
    """Prints the tables of a report and writes its JSON file."""
    console = make_console()
    divergence = report.divergence
    console.print(_table(report.title, divergence.figures))
    how = (
        "the reverse KL is exact over the vocabulary in each of the contexts"
        if divergence.estimate == EXACT
        else "the reverse KL is a sampled estimate: a served teacher tells the sampled token alone"
    )
    console.print(
        f"{divergence.prompts} prompts, {divergence.tokens} tokens; {how}; 95% intervals over "
        "prompts"
    )
    if compare is not None:
        differences = _differences(report, compare)
        console.print(_table(f"Minus {compare.stem}, paired by prompt", differences, "+"))
    if json_file is not None:
        write_json(json_file, report.to_dict())
        console.print(f"figures: {json_file}", soft_wrap=True)
    console.print(f"completions: {report.facts['completions']}", soft_wrap=True)


def _table(title: str, figures: Mapping[str, Estimate], sign: str = "") -> Table:
    """Returns a table with a line for each figure."""
    shown = Table(title=title)
    for column in ("", "mean", "95% interval"):
        shown.add_column(column, justify="right" if column else "left")
    for name, metric in OF_DIVERGENCE.items():
        cell, figure = metric.table or Shown(metric.title, "g"), figures[name]
        cell = replace(cell, format=f"{sign}{cell.format}")
        low, high = cell.text(figure.low), cell.text(figure.high)
        shown.add_row(metric.measure, cell.text(figure.mean), f"[{low}, {high}]")
    return shown


def _differences(report: DivergenceReport, path: Path) -> dict[str, Estimate]:
    """Returns the differences of a report from a file of --json, paired by prompt."""
    found = read_json(path) if path.is_file() else {}
    own = report.to_dict()
    try:
        asked, other = ({**one["settings"], **one["data"]} for one in (own, found))
        differing = [f"{k}: {v!r} != {other[k]!r}" for k, v in asked.items() if other[k] != v]
        facts = [(key, own[key], found[key]) for key in ("teacher", "estimate")]
        if asked["digest"] == other["digest"]:  # the same rows, wherever they lie
            differing = [text for text in differing if not text.startswith("prompts: ")]
        pairs = (report.divergence.per_prompt, found["per_prompt"])
        differences = {} if differing else paired_differences(*pairs)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UsageError(
            f"{path}: expected a file written by poweropd eval --prompts --json "
            f"({type(error).__name__})"
        ) from None
    if differing:
        raise UsageError(
            f"{path}: expected an evaluation on the same prompts with the same settings, got "
            f"another one ({'; '.join(differing)})"
        )
    for key, here, there in facts:
        if here != there:
            logger.warning("%s: its %s is %s, and here %s", path, key, there, here)
    return differences
