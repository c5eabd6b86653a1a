"""The loop: prompts -> rollout -> score -> update -> sync, one optimizer step at a time."""

import copy
import importlib.util
import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed

from poweropd import checkpoint, data, models, objectives, stops
from poweropd.accounting import StepClock
from poweropd.batching import Example, Rollout, make_examples
from poweropd.config import Config
from poweropd.errors import UsageError
from poweropd.evaluation.runner import Subject
from poweropd.progress import TrainingProgress
from poweropd.records import (
    RunDirectory,
    completion_metrics,
    distribution,
    replaced_directory,
)
from poweropd.rollouts.base import Request, Sampling, completion_seed
from poweropd.rollouts.transformers import TransformersEngine
from poweropd.teachers.local import LocalTeacher
from poweropd.update import Outcome, Updater
from poweropd.validation import Validation

logger = logging.getLogger("poweropd")


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    run_dir: Path
    steps: int  # optimizer steps done in all
    final: Path | None  # a Hugging Face model directory; None if the run was interrupted
    interrupted_by: int | None = None  # signal number


class Trainer:
    """Trains the student of a recipe.

    Creating one checks everything that can be checked, the cheap things before any weight is
    loaded, and takes up the last complete checkpoint of the run directory if there is one.
    Raises UsageError, one line, for the user's mistakes.
    """

    def __init__(self, config: Config, progress: bool = True) -> None:
        self.config = config
        check_trackers(config.log.trackers)
        self.accelerator = Accelerator(
            log_with=config.log.trackers or None,
            project_config=ProjectConfiguration(config.run.dir, f"{config.run.dir}/trackers"),
        )
        self.progress = progress and self.accelerator.is_main_process
        self.reward = config.reward.create()
        self._load_inputs()
        with self.accelerator.main_process_first():
            self.run = RunDirectory.open(config)
        self._load_models()
        self.steps_done = self._resume()
        self.accelerator.init_trackers("poweropd", config=self.config.flat_text())

    def train(self, until: int | None = None) -> Result:
        """Runs the remaining steps, or those before step `until`.

        SIGINT and SIGTERM finish the step and write a checkpoint.
        """
        steps, every = self.config.train.steps, self.config.checkpoint.every
        end = steps if until is None else min(until, steps)
        if self.run.final.exists():
            logger.info("%s is complete: nothing to do", self.run.path)
            return Result(self.run.path, self.steps_done, self.run.final)
        progress = TrainingProgress(steps, self.steps_done, self.run.path.name, self.progress)
        with progress, _deferred_signals() as received:
            while self.steps_done < end:
                metrics = self.step(self.steps_done)
                self.steps_done += 1
                metrics |= self._validate()
                self._record(metrics)
                progress.update(self.steps_done, metrics)
                interrupted = any(gather_object([bool(received)]))
                if interrupted or self.steps_done % every == 0 or self.steps_done == end:
                    self._save_checkpoint()
                if interrupted and self.steps_done < steps:
                    number = received[0] if received else signal.SIGTERM  # another process's
                    return Result(self.run.path, self.steps_done, None, number)
            if self.steps_done < steps:
                return Result(self.run.path, self.steps_done, None)
            self._export(self.run.final)
        self.accelerator.end_training()
        return Result(self.run.path, self.steps_done, self.run.final)

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step, counted from 0; returns its metrics."""
        clock = StepClock(self.accelerator.device)
        reward = self.reward.at(step)
        with clock.phase("rollout"):
            rollouts = list(self.engine.generate(self._requests(step), self.sampling))
            examples = self.make_examples(rollouts)
        with clock.phase("score"):
            examples = self.teacher.score(examples) if self.scores_ahead else examples
        with clock.phase("update"):
            outcome = self.updater.update(examples, reward, step)
        with clock.phase("sync"):
            self.engine.sync()
        return self._metrics(step, rollouts, outcome, clock)

    def _requests(self, step: int) -> list[Request]:
        """This process's completions of the step."""
        train, rollout = self.config.train, self.config.rollout
        rows = self.order.at_step(step, train.prompts_per_step)
        # A prompt's number within the step, not its row, identifies it: a row that comes twice in
        # a step gets two different completions.
        requests = [
            Request(
                prompt_index=number,
                sample_index=sample,
                prompt_ids=self.prompts[row].prompt_ids,
                teacher_prompt_ids=self.prompts[row].teacher_prompt_ids,
                seed=completion_seed(train.seed, step, number, sample),
            )
            for number, row in enumerate(rows)
            for sample in range(rollout.per_prompt)
        ]
        return requests[self.accelerator.process_index :: self.accelerator.num_processes]

    def subject(self) -> Subject:
        """The current student as something to evaluate."""
        context = models.context_length(self.student.model.config)
        identity = f"{self.config.model.student} after {self.steps_done} steps of {self.run.path}"
        return Subject(self.engine, self.tokenizer, self.sampling.stop_ids, context, identity)

    def make_examples(self, rollouts: list[Rollout]) -> list[Example]:
        """What is trained on, by the recipe's stop policy."""
        policy = self.config.objective.stop
        return make_examples(rollouts, self.student_stop_ids, self.teacher_stop_ids, policy)

    def _metrics(
        self, step: int, rollouts: list[Rollout], outcome: Outcome | None, clock: StepClock
    ) -> dict[str, Any]:
        ends = gather_object([(len(r.completion_ids), r.stopped) for r in rollouts])
        completions = completion_metrics([n for n, _ in ends], [stopped for _, stopped in ends])
        learning_rate = self.updater.learning_rate(step)
        row = {"step": step + 1, **completions, "learning_rate": learning_rate}
        row |= token_metrics(outcome)
        row |= clock.metrics(sum(n for n, _ in ends))
        return row

    def _validate(self) -> dict[str, float]:
        """Evaluates the current student where the recipe asks for it, and keeps the best one."""
        last = self.steps_done == self.config.train.steps
        if self.validation is None or not self.validation.due(self.steps_done, last):
            return {}
        metrics = self.validation.evaluate(self.subject(), self.steps_done)
        if self.validation.is_best(metrics, self.steps_done):
            self._export(self.run.path / "best")
        return metrics

    def _record(self, metrics: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.run.append_metrics(metrics)
        numbers = {key: value for key, value in metrics.items() if value is not None}
        self.accelerator.log(numbers, step=metrics["step"])

    # Setting up: inputs first, then the run directory, then weights.

    def _load_inputs(self) -> None:
        config = self.config
        student = (config.model.student, config.model.trust_remote_code)
        teacher = (config.teacher.model, config.teacher.trust_remote_code)
        self.tokenizer, teacher_tokenizer = (models.load_tokenizer(*m) for m in (student, teacher))
        models.check_vocabularies(self.tokenizer, teacher_tokenizer)
        self.prompts = data.load_prompts(config.data, self.tokenizer, teacher_tokenizer)
        data.check_lengths(
            self.prompts,
            models.context_length(models.load_config(*student)),
            models.context_length(models.load_config(*teacher)),
            config.rollout.max_new_tokens,
        )
        self.order = data.PromptOrder(len(self.prompts), config.train.seed, config.data.shuffle)
        self.student_stop_ids, self.teacher_stop_ids = (
            stops.stop_ids(tokenizer, models.load_generation_config(name))
            for tokenizer, (name, _) in ((self.tokenizer, student), (teacher_tokenizer, teacher))
        )
        self.validation = None
        if config.evaluate is not None:
            context = models.context_length(models.load_config(*student))
            self.validation = Validation(
                config, config.evaluate, self.accelerator, self.tokenizer, context
            )
        notice = stops.difference(
            self.student_stop_ids, self.teacher_stop_ids, config.objective.stop, self.tokenizer
        )
        if notice and self.progress:
            logger.warning(notice)

    def _load_models(self) -> None:
        config, device = self.config, self.accelerator.device
        set_seed(config.train.seed)  # a fresh LoRA adapter is random
        model = models.load_trained(config.model).to(device)
        teacher_model = models.load_model(
            config.teacher.model, config.teacher.dtype, config.teacher.trust_remote_code
        ).to(device)
        vocab_size = models.shared_vocab_size(model, teacher_model)
        dtype = models.DTYPES[config.model.dtype]
        student = models.Student(model, vocab_size, dtype, lora=config.model.lora is not None)
        teacher = models.Teacher(teacher_model, vocab_size, models.DTYPES[config.teacher.dtype])
        self.scores_ahead = config.objective.kind == "sampled"
        self.teacher = LocalTeacher(teacher, config.teacher.max_tokens_per_batch)
        self.updater = Updater(
            self.accelerator,
            student,
            config.train,
            objectives.maker(config.objective.kind, teacher.head()),
            None if self.scores_ahead else teacher,
        )
        self.student = student
        self.engine = make_engine(student, config)
        self.sampling = Sampling(
            max_new_tokens=config.rollout.max_new_tokens,
            stop_ids=tuple(dict.fromkeys([*self.student_stop_ids, *self.teacher_stop_ids])),
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
        )

    # Saving and resuming.

    def _save_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            checkpoint.save(
                self.run.checkpoints,
                self.steps_done,
                weights=self.student.trained_weights(),
                optimizer=self.updater.optimizer.state_dict(),
                state={"max_tokens": self.updater.max_tokens},
                keep=self.config.checkpoint.keep,
            )
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Takes up the last complete checkpoint; returns the number of steps done."""
        path = checkpoint.latest(self.run.checkpoints)
        steps = 0
        if path is not None:
            weights, optimizer, state = checkpoint.load(path)
            self.student.load_trained_weights(weights)
            self.updater.optimizer.load_state_dict(optimizer)
            self.updater.max_tokens = state["max_tokens"]
            self.engine.sync()
            steps = state["step"]
            logger.info("resuming %s at step %d", self.run.path, steps)
        if self.accelerator.is_main_process:
            self.run.truncate_metrics(steps)
        self.accelerator.wait_for_everyone()
        return steps

    def _export(self, folder: Path) -> None:
        """The student as a plain Hugging Face model directory, whole or not at all."""
        if self.accelerator.is_main_process:
            with replaced_directory(folder) as temporary:
                lora = self.config.model.lora
                stop_ids = list(self.sampling.stop_ids)
                self.student.save(temporary, stop_ids, merge=lora is not None and lora.merge)
                self.tokenizer.save_pretrained(temporary)
        self.accelerator.wait_for_everyone()


def check_trackers(names: Sequence[str]) -> None:
    """accelerate leaves a tracker out without a word if its package is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"log.trackers: {', '.join(missing)} not installed: pip install 'poweropd[trackers]' "
            f"for tensorboard, else pip install {' '.join(missing)}"
        )


def make_engine(student: models.Student, config: Config) -> TransformersEngine:
    """The engine samples from the student itself, or from a copy in the compute dtype."""
    model, batch_size = student.model, config.rollout.batch_size
    if model.dtype == student.compute_dtype:
        return TransformersEngine(model, vocab_size=student.vocab_size, batch_size=batch_size)
    twin = copy.deepcopy(model).requires_grad_(False)
    for parameter in twin.parameters():
        # Not `twin.to(dtype)`: that would round the buffers of rotary embeddings as well.
        parameter.data = parameter.data.to(student.compute_dtype)

    @torch.no_grad()
    def sync() -> None:
        for own, trained in zip(twin.parameters(), model.parameters(), strict=True):
            own.copy_(trained)

    return TransformersEngine(twin, vocab_size=student.vocab_size, batch_size=batch_size, sync=sync)


def token_metrics(outcome: Outcome | None) -> dict[str, Any]:
    """What the run reports of a step's trained tokens; None where a number is not finite."""
    if outcome is None:
        return {"num_tokens": 0}
    record = outcome.record
    log_ratio = distribution(record.teacher_log_probs - record.student_log_probs)
    metrics = {
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        **{f"reward/{key}": value for key, value in distribution(record.rewards).items()},
        "reward/zero_fraction": (record.rewards == 0).double().mean().item(),
        **{f"log_ratio/{key}": log_ratio[key] for key in ("mean", "min", "max")},
        "reverse_kl": -log_ratio["mean"],
        "entropy": record.entropy.double().mean().item(),
    }
    finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    return {"num_tokens": outcome.num_tokens, **finite}


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of stopping; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning(
            "%s: finishing this step, then writing a checkpoint; once more to stop at once",
            signal.Signals(number).name,
        )

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
