"""Benchmarks during training: on the current student, with the engine that is loaded already."""

import logging
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from poweropd.config import Config
from poweropd.config.benchmarks import BenchmarkConfig
from poweropd.config.sections import EvaluateConfig
from poweropd.errors import RunError, UsageError
from poweropd.evaluation import benchmarks
from poweropd.evaluation.benchmarks import ProblemSet
from poweropd.evaluation.metrics import summarize
from poweropd.evaluation.results import unanswered_note
from poweropd.evaluation.runner import Subject, check_room, evaluate, prompt_ids
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.grading.graders.base import create_grader
from poweropd.runs.directory import BestStep, RunDirectory
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import OF_BENCHMARKS, OF_SCORES

logger = logging.getLogger("poweropd")


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
    """The recipe's `evaluate` section. Problems are loaded, and checked, on creation."""

    def __init__(
        self,
        config: Config,
        section: EvaluateConfig,
        accelerator: Accelerator,
        tokenizer: Any,
        context_length: int,
    ) -> None:
        self.section, self.accelerator = section, accelerator
        self.run = RunDirectory(config.run.dir)
        if self.section.best not in OF_BENCHMARKS:
            known, got = ", ".join(OF_BENCHMARKS), self.section.best
            raise UsageError(f"evaluate.best: expected one of {known}, got {got!r}")
        self.problem_sets = load_problem_sets(section, config)
        self._told: set[str] = set()  # benchmarks whose lack of answers was spoken of
        for name, one in self.problem_sets.items():
            check_room(name, prompt_ids(one.problems, one.settings, tokenizer), context_length)

    def due(self, steps_done: int, last: bool) -> bool:
        return last or steps_done % self.section.every == 0

    def evaluate(self, subject: Subject, steps_done: int) -> dict[str, float]:
        """Returns metrics "eval/BENCHMARK/METRIC"; every process takes its share of problems."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        folder = self.run.evaluation_folder(steps_done)
        done = evaluate(
            subject,
            self.problem_sets,
            folder if world == 1 else folder / f"rank-{rank}-of-{world}",
            progress=False,
            share=(rank, world),
        )
        metrics: dict[str, float] = {}
        found: dict[str, JsonObject] = {}
        for name, one in self.problem_sets.items():
            rows = gather_object(done[name].rows)
            try:
                summary = summarize(rows, n=one.settings.n)
            except ValueError as error:
                raise RunError(f"{name}: {error}") from None
            found[name] = asdict(summary)
            metrics |= {m.of(name): found[name][key]["mean"] for key, m in OF_BENCHMARKS.items()}
            metrics |= {OF_SCORES.of(name, key): e.mean for key, e in summary.scores.items()}
            if summary.unanswered and name not in self._told and self.accelerator.is_main_process:
                self._told.add(name)
                logger.warning("%s", unanswered_note(name, summary))
        if self.accelerator.is_main_process:
            self.run.write_evaluation(steps_done, found)
        return metrics

    def is_best(self, metrics: dict[str, float], steps_done: int) -> bool:
        """Tells whether these are the best so far by the named metric, and remembers them if so.

        The metric is averaged over the benchmarks; lengths and truncations are better if lower.
        """
        name = self.section.best
        metric = OF_BENCHMARKS[name]
        value = sum(metrics[metric.of(b)] for b in self.problem_sets) / len(self.problem_sets)
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
