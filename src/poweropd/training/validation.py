"""Benchmarks during training: on the current student, with the engine that is loaded already."""

import json
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
from poweropd.runs.directory import RunDirectory, write_atomically

REPORTED = ("avg_at_k", "pass_at_k", "maj_at_k", "mean_length", "truncated_fraction")


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
        if self.section.best not in REPORTED:
            raise UsageError(
                f"evaluate.best: expected one of {', '.join(REPORTED)}, got {self.section.best!r}"
            )
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
        self.best_path = self.run.path / "best.json"
        for name, problems in self.problems.items():
            check_room(name, prompt_ids(problems, self.settings, tokenizer), context_length)

    def due(self, steps_done: int, last: bool) -> bool:
        return last or steps_done % self.section.every == 0

    def evaluate(self, subject: Subject, steps_done: int) -> dict[str, float]:
        """Metrics "eval/BENCHMARK/METRIC". Every process takes its share of the problems."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        folder = self.run.evaluations / f"step-{steps_done}"
        done = evaluate(
            subject,
            self.problems,
            self.settings,
            folder if world == 1 else folder / f"rank-{rank}-of-{world}",
            progress=False,
            share=(rank, world),
        )
        metrics: dict[str, float] = {}
        found: dict[str, Any] = {}
        for name in self.problems:
            rows = gather_object(done[name].rows)
            found[name] = asdict(summarize(rows, n=self.section.n))
            metrics |= {f"eval/{name}/{key}": found[name][key]["mean"] for key in REPORTED}
        if self.accelerator.is_main_process:
            write_atomically(folder / "results.json", json.dumps({"results": found}, indent=2))
        return metrics

    def is_best(self, metrics: dict[str, float], steps_done: int) -> bool:
        """Whether these are the best so far by the named metric, which is then remembered.

        The metric is averaged over the benchmarks; lengths and truncations are better if lower.
        """
        name = self.section.best
        value = sum(metrics[f"eval/{b}/{name}"] for b in self.problems) / len(self.problems)
        best = self._best()
        sign = -1 if name in ("mean_length", "truncated_fraction") else 1
        if best is not None and sign * value <= sign * best["value"] and steps_done != best["step"]:
            return False
        if self.accelerator.is_main_process:
            text = json.dumps({"metric": name, "value": value, "step": steps_done})
            write_atomically(self.best_path, text)
        self.accelerator.wait_for_everyone()
        return True

    def _best(self) -> dict[str, Any] | None:
        found = json.loads(self.best_path.read_text()) if self.best_path.exists() else None
        self.accelerator.wait_for_everyone()  # nobody reads after the main process has written
        return found
