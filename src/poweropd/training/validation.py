"""Evaluations during training: of the current student, with the engine that is loaded already."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from poweropd.config import Config
from poweropd.config.benchmarks import BenchmarkConfig
from poweropd.config.evaluate import HELD_OUT, EvaluateConfig
from poweropd.data.prompts import Prompt, check_ids, check_lengths, check_shared, load_prompts
from poweropd.errors import RunError, UsageError
from poweropd.evaluation import benchmarks
from poweropd.evaluation.benchmarks import ProblemSet
from poweropd.evaluation.divergence import DIVERGENCE, summarize_divergence
from poweropd.evaluation.judging import (
    Compare,
    DivergenceEvaluation,
    Judge,
    Judges,
    LocalJudge,
    ServedJudge,
)
from poweropd.evaluation.metrics import Summary, summarize
from poweropd.evaluation.results import unanswered_note
from poweropd.evaluation.runner import Subject, check_room, prompt_ids, run_benchmarks
from poweropd.evaluation.settings import DivergenceSettings, EvaluationSettings
from poweropd.grading.graders.base import create_grader
from poweropd.models import loading
from poweropd.models.language_model import Teacher
from poweropd.rollouts.base import RolloutEngine
from poweropd.rollouts.served import ServedModel
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.rollouts.turns.engine import Turns
from poweropd.rollouts.turns.tools import tool_schemas
from poweropd.runs.directory import TEACHER, BestStep, RunDirectory
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import OF_BENCHMARKS, OF_DIVERGENCE, OF_SCORES
from poweropd.runs.pace import Say, silent
from poweropd.teachers.factory import TeacherProfile
from poweropd.training.grades.feedback import Feedback

logger = logging.getLogger("poweropd")

PROMPTS_KEY = "evaluate.divergence.prompts"


def load_problem_sets(section: EvaluateConfig, config: Config) -> dict[str, ProblemSet]:
    """Returns name -> problems of all benchmarks; raises UsageError if any cannot be had."""
    found: dict[str, ProblemSet] = {}
    for number, entry in enumerate(section.benchmarks):
        name, one = _problem_set(section, config, entry, f"evaluate.benchmarks.{number}")
        if name in found:
            raise UsageError(f"evaluate.benchmarks: two are called {name!r}: give one a name")
        found[name] = one
    return found


def _problem_set(
    section: EvaluateConfig, config: Config, entry: str | BenchmarkConfig, key: str
) -> tuple[str, ProblemSet]:
    """Returns the name and the problems of an entry of `evaluate.benchmarks`, which is `key`."""
    described = isinstance(entry, BenchmarkConfig) and entry.name
    own = BenchmarkConfig.model_construct(name=entry) if isinstance(entry, str) else entry
    place = str(own.file or own.dataset or own.name)
    settings = EvaluationSettings(
        n=own.n or section.n,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        seed=config.train.seed,
        chat=config.data.chat,
        system=config.data.system,
        tools=tool_schemas(config.rollout.tool_names),
        instruction=own.instruction,
        grader=own.grader or section.grader,
    )
    grader = create_grader(f"{key}.grader" if own.grader else "evaluate.grader", settings.grader)
    problems = benchmarks.load_benchmark(
        place,
        section.data_dir,
        own.limit or section.limit,
        problem_column=own.problem,
        answer_column=own.answer,
        config=own.config,
        revision=own.revision,
        split=own.split,
        file=own.file,
        dataset=own.dataset,
        grader=grader,
    )
    return described or benchmarks.short_name(place), ProblemSet(problems, settings, grader)


class Validation:
    """The recipe's `evaluate` section. Problems are loaded, and checked, on creation.

    `judged` are the prompts of its divergence; none if it has no divergence. No problem may hold
    an id that is `unshared`, which rollout engines need not have.
    """

    def __init__(
        self,
        config: Config,
        section: EvaluateConfig,
        accelerator: Accelerator,
        tokenizer: Any,
        context_length: int,
        judged: Sequence[Prompt] = (),
        unshared: Collection[int] = (),
    ) -> None:
        self.section, self.accelerator, self.judged = section, accelerator, judged
        self.run = RunDirectory(config.run.dir)
        self.problem_sets = load_problem_sets(section, config)
        self._told: set[str] = set()  # benchmarks whose lack of answers was spoken of
        if DIVERGENCE in self.problem_sets and judged:
            raise UsageError(f"evaluate.benchmarks: {DIVERGENCE} is no name for a benchmark")
        # Metrics of the same name are those of the benchmarks.
        self.better = (OF_DIVERGENCE if judged else {}) | (
            OF_BENCHMARKS if self.problem_sets else {}
        )
        if self.section.best not in self.better:
            known, got = ", ".join(self.better), self.section.best
            raise UsageError(f"evaluate.best: expected one of {known}, got {got!r}")
        for name, one in self.problem_sets.items():
            asked = prompt_ids(one.problems, one.settings, tokenizer)
            check_room(name, asked, context_length)
            prompts = [Prompt(number, ids, ids) for number, ids in enumerate(asked)]
            check_shared(prompts, unshared, tokenizer, f"evaluate.benchmarks: {name}")
        self.divergence_settings = _divergence_settings(config, section)
        self.teacher_names = config.teacher_names()

    def due(self, steps_done: int, last: bool) -> bool:
        """Tells whether the student is evaluated after so many steps; 0 is before the first."""
        if not steps_done:
            return self.section.before
        return last or steps_done % (self.section.every or 1) == 0

    def evaluate(
        self, subject: Subject, steps_done: int, judges: Judges | None, say: Say = silent
    ) -> dict[str, float]:
        """Returns metrics "eval/NAME/METRIC"; every process takes its share of the problems.

        `say` gets lines, by time, of how far the evaluation is.
        """
        folder = self.run.evaluation_folder(steps_done)
        metrics: dict[str, float] = {}
        found: dict[str, JsonObject] = {}
        for name, summary in self._on_benchmarks(subject, folder, say).items():
            found[name] = asdict(summary)
            metrics |= {m.of(name): found[name][key]["mean"] for key, m in OF_BENCHMARKS.items()}
            metrics |= {OF_SCORES.of(name, key): e.mean for key, e in summary.scores.items()}
        divergence: JsonObject = {}
        if judges is not None:
            divergence = self._divergence(subject, folder, judges, say)
            metrics |= {m.key: divergence[DIVERGENCE][k]["mean"] for k, m in OF_DIVERGENCE.items()}
        if self.accelerator.is_main_process:
            self.run.write_evaluation(steps_done, found, divergence)
        return metrics

    def evaluate_teacher(self, subject: Subject, say: Say = silent) -> dict[str, float]:
        """Evaluates the teacher on the benchmarks, once in a run; returns its metrics.

        They are named "eval/teacher/BENCHMARK/METRIC". Every process takes its share of problems.
        """
        summaries = self._on_benchmarks(subject, self.run.evaluations_path / TEACHER, say)
        found: dict[str, JsonObject] = {name: asdict(one) for name, one in summaries.items()}
        if self.accelerator.is_main_process:
            self.run.write_teacher_evaluation(found)
        return {
            m.of(f"{TEACHER}/{name}"): found[name][key]["mean"]
            for name in found
            for key, m in OF_BENCHMARKS.items()
        }

    def _own(self, folder: Path) -> tuple[Path, tuple[int, int]]:
        """Returns this process's folder and share, (first, stride), of an evaluation."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return folder if world == 1 else folder / f"rank-{rank}-of-{world}", (rank, world)

    def _on_benchmarks(self, subject: Subject, folder: Path, say: Say) -> dict[str, Summary]:
        own, share = self._own(folder)
        done = run_benchmarks(subject, self.problem_sets, own, share=share, say=say)
        found = {}
        for name, one in self.problem_sets.items():
            rows = gather_object(done[name].rows)
            try:
                found[name] = summary = summarize(rows, n=one.settings.n)
            except ValueError as error:
                raise RunError(f"{name}: {error}") from None
            if summary.unanswered and name not in self._told and self.accelerator.is_main_process:
                self._told.add(name)
                logger.warning("%s", unanswered_note(name, summary))
        return found

    def _divergence(self, subject: Subject, folder: Path, judges: Judges, say: Say) -> JsonObject:
        own, share = self._own(folder)
        models = {"model": subject.identity, "teacher": self.teacher_names}
        evaluation = DivergenceEvaluation(self.judged, self.divergence_settings, own, models, share)
        rows = gather_object(evaluation.run(subject, judges, say=say))
        try:
            return summarize_divergence(rows, judges.estimate).to_dict()
        except ValueError:
            raise RunError(
                f"every completion of {PROMPTS_KEY} is empty: check the student, its chat template "
                f"and its stop tokens (the completions are in {folder})"
            ) from None

    def is_best(self, metrics: dict[str, float], steps_done: int) -> bool:
        """Tells whether these are the best so far by the named metric, and remembers them if so.

        A metric of benchmarks is averaged over them; some metrics are better if lower.
        """
        name = str(self.section.best)
        metric = self.better[name]
        keys = [metric.of(benchmark) for benchmark in self.problem_sets or [""]]
        value = sum(metrics[key] for key in keys) / len(keys)
        best = self._best()
        sign = -1 if metric.better == "lower" else 1
        if best is not None and sign * value <= sign * best.value and steps_done != best.step:
            return False
        if self.accelerator.is_main_process:
            self.run.write_best(name, value, steps_done)
        self.accelerator.wait_for_everyone()
        return True

    def _best(self) -> BestStep | None:
        found = self.run.best()
        self.accelerator.wait_for_everyone()  # nobody reads after the main process has written
        return found


def _divergence_settings(config: Config, section: EvaluateConfig) -> DivergenceSettings:
    """Returns how completions are sampled for the divergence; the defaults if there is none."""
    divergence = section.divergence
    if divergence is None:
        return DivergenceSettings()
    return DivergenceSettings(
        n=divergence.n,
        max_new_tokens=divergence.max_new_tokens or config.rollout.longest,
        temperature=divergence.temperature,
        seed=config.train.seed,
    )


def judged_prompts(
    config: Config,
    held_out: Sequence[Prompt],
    tokenizer: Any,
    teachers: Mapping[str, TeacherProfile],
    context: int,
) -> Sequence[Prompt]:
    """Returns the prompts of the divergence; [] if the recipe has none.

    `context` is the student's, in tokens. Raises UsageError for prompts that cannot be used.
    """
    section = config.evaluate
    if section is None or section.divergence is None:
        return []
    source, prompts = section.divergence.prompts, held_out
    if source != HELD_OUT:
        data = config.data.model_copy(update={"prompts": source})
        tokenizers = {name: teacher.tokenizer for name, teacher in teachers.items()}
        tools = tool_schemas(config.rollout.tool_names)
        prompts = load_prompts(data, tokenizer, tokenizers, config.teacher.by, tools=tools)
        own = loading.load_config(config.model.student, config.model.trust_remote_code)
        check_ids(prompts, loading.vocab_rows(own), None, PROMPTS_KEY)
    prompts = prompts[: section.divergence.limit]
    tokens = _divergence_settings(config, section).max_new_tokens
    shortest = min(teacher.context for teacher in teachers.values())
    check_lengths(prompts, context, shortest, tokens, PROMPTS_KEY)
    return prompts


def make_judges(
    config: Config,
    profiles: Mapping[str, TeacherProfile],
    teachers: Mapping[str, Teacher],
    compare: Compare,
    accelerator: Accelerator,
    together: Callable[[], AbstractContextManager[object]],
    feedback: Feedback | None = None,
) -> Judges | None:
    """Returns the teachers as judges of completions; None if the recipe has no divergence.

    `teachers` are those in this process; `compare` is the student's; `together` makes a failure in
    one process one in all. `feedback` tells the teachers of the completions.
    """
    if config.evaluate is None or config.evaluate.divergence is None:
        return None
    judges: dict[str, Judge] = {}
    for name, section in config.teachers.items():
        server = profiles[name].server
        if server is not None:
            judges[name] = ServedJudge(server, compare, together)
        else:
            offload_from = accelerator.device if section.offload else None
            judges[name] = LocalJudge(teachers[name], compare, offload_from)
    informed = list if feedback is None else feedback.of
    return Judges(judges, lambda flags: gather_object([flags]), together, informed)


@contextmanager
def teacher_subject(
    config: Config, profile: TeacherProfile, teacher: Teacher | None, device: torch.device
) -> Iterator[Subject]:
    """Yields the only teacher of a recipe as something to evaluate; None is one on servers."""
    section = config.only_teacher
    if teacher is None:
        engine: RolloutEngine = ServedModel(section)
    else:
        rows = teacher.causal_lm.get_output_embeddings().weight.shape[0]
        batch_size = config.rollout.batch_size
        engine = TransformersEngine(teacher.causal_lm, vocab_size=rows, batch_size=batch_size)
        teacher.to(device)
    turns = Turns.of(config, profile.tokenizer, profile.stop_ids)
    engine = engine if turns is None else turns.around(engine)
    try:
        yield Subject(
            engine, profile.tokenizer, tuple(profile.stop_ids), profile.context, section.model
        )
    finally:
        if teacher is not None and section.offload:
            teacher.to("cpu")
