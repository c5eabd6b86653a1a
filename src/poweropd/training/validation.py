"""Benchmarks during training: on the current student, with the engine that is loaded already."""

from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from poweropd.config import Config
from poweropd.config.sections import EvaluateConfig
from poweropd.errors import UsageError
from poweropd.evaluation import benchmarks
from poweropd.evaluation.metrics import summarize
from poweropd.evaluation.runner import Subject, check_room, evaluate, prompt_ids
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.runs.directory import BestStep, RunDirectory
from poweropd.runs.files import JsonObject
from poweropd.runs.metrics import OF_BENCHMARKS


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
        self.problems = {
            benchmarks.short_name(name): benchmarks.load_benchmark(
                name, self.section.data_dir, self.section.limit
            )
            for name in self.section.benchmarks
        }
        self.settings = EvaluationSettings(
            n=self.section.n,
            max_new_tokens=self.section.max_new_tokens,
            temperature=self.section.temperature,
            top_p=self.section.top_p,
            top_k=self.section.top_k,
            seed=config.train.seed,
            chat=config.data.chat,
            system=config.data.system,
        )
        for name, problems in self.problems.items():
            check_room(name, prompt_ids(problems, self.settings, tokenizer), context_length)

    def due(self, steps_done: int, last: bool) -> bool:
        return last or steps_done % self.section.every == 0

    def evaluate(self, subject: Subject, steps_done: int) -> dict[str, float]:
        """Returns metrics "eval/BENCHMARK/METRIC"; every process takes its share of problems."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        folder = self.run.evaluation_folder(steps_done)
        done = evaluate(
            subject,
            self.problems,
            self.settings,
            folder if world == 1 else folder / f"rank-{rank}-of-{world}",
            progress=False,
            share=(rank, world),
        )
        metrics: dict[str, float] = {}
        found: dict[str, JsonObject] = {}
        for name in self.problems:
            rows = gather_object(done[name].rows)
            found[name] = asdict(summarize(rows, n=self.section.n))
            metrics |= {m.of(name): found[name][key]["mean"] for key, m in OF_BENCHMARKS.items()}
        if self.accelerator.is_main_process:
            self.run.write_evaluation(steps_done, found)
        return metrics

    def is_best(self, metrics: dict[str, float], steps_done: int) -> bool:
        """Tells whether these are the best so far by the named metric, and remembers them if so.

        The metric is averaged over the benchmarks; lengths and truncations are better if lower.
        """
        name = self.section.best
        metric = OF_BENCHMARKS[name]
        value = sum(metrics[metric.of(b)] for b in self.problems) / len(self.problems)
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
