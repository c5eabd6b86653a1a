"""The loop: prompts -> rollout -> score -> update -> sync, one optimizer step at a time."""

import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed

from poweropd.config import Config
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Example, Request, Rollout, make_example
from poweropd.errors import RunError
from poweropd.evaluation.runner import Subject
from poweropd.models.loading import context_length
from poweropd.models.sharding import collected, load_optimizer_state, optimizer_state
from poweropd.rollouts.base import completion_seed
from poweropd.runs import card
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import replaced_directory
from poweropd.runs.metrics import MetricRow, tracked
from poweropd.runs.recorder import RewardRecorder
from poweropd.training import build, checkpoint, signals, trackers
from poweropd.training.accounting import StepClock
from poweropd.training.build import RunInputs
from poweropd.training.metrics import completion_metrics, sampler_metrics, token_metrics
from poweropd.training.progress import TrainingProgress
from poweropd.training.update import UpdateOutcome

T = TypeVar("T")
logger = logging.getLogger("poweropd")

# Mean |ln p_student - ln p_sampler| of a step's tokens above which a run is warned.
SAMPLER_TOLERANCE = 0.05


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
        build.check_launch()
        trackers.check_trackers(config.log.trackers)
        self.accelerator = Accelerator(
            log_with=config.log.trackers or None,
            project_config=ProjectConfiguration(config.run.dir, f"{config.run.dir}/trackers"),
        )
        self.progress = progress and self.accelerator.is_main_process
        self.reward = config.reward.create()
        self.inputs = RunInputs.load(config, notify=self.progress)
        self.validation = build.make_validation(config, self.accelerator, self.inputs)
        with self.accelerator.main_process_first():
            self.run = RunDirectory.open(config)
        set_seed(config.train.seed)  # a fresh LoRA adapter is random
        self.models = build.load_models(config, self.inputs, self.accelerator.device)
        self.student = self.models.student
        self.teacher = build.make_teacher(
            config, self.inputs, self.models, self.run, self.accelerator
        )
        self.engine = build.make_engine(
            config, self.inputs, self.student, self.accelerator, self.student_log_probs
        )
        self.updater = build.make_updater(config, self.models, self.inputs, self.accelerator)
        self.sampling = build.make_sampling(config, self.inputs)
        self.rollouts = build.make_schedule(config, self.engine, self.sample)
        self.task_rewards = build.make_task_rewards(config, self.inputs)
        self.recorder = RewardRecorder(self.run.rewards, self.inputs.tokenizer.decode)
        self.utilization = build.make_utilization(config, self.models)
        self.steps_done = self._resume()
        self.engine.sync()
        options = trackers.tracker_options(config.log.trackers, self.run.path)
        self.accelerator.init_trackers("poweropd", config.flat_text(), options)

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
        with progress, self.recorder, signals.deferred() as received:
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
        self._end_trackers()
        return Result(self.run.path, self.steps_done, self.run.final)

    def step(self, step: int) -> MetricRow:
        """One optimizer step, counted from 0; returns its metrics."""
        clock = StepClock(self.accelerator.device)
        reward = self.reward.at(step)
        with clock.phase("rollout"):
            taken = self.rollouts.take(step)
            rollouts = self._together(lambda: list(self._submitted(taken, self.prompts(step))))
        self.rollouts.begin(step + 1)
        with clock.phase("score"):
            examples, task_rewards = self._collected()
        with clock.phase("update"):
            outcome = self.updater.update(examples, reward, step)
        with clock.phase("rollout"):
            self.rollouts.finish()
        with clock.phase("sync"):
            self.engine.sync()
        metrics = self._metrics(step, rollouts, task_rewards, outcome, clock)
        return metrics | (self.utilization.metrics(examples, clock) if self.utilization else {})

    def prompts(self, step: int) -> list[Prompt]:
        """The prompts of a step, over all processes; a completion's prompt_index is into them."""
        rows = self.inputs.order.at_step(step, self.config.train.prompts_per_step)
        return [self.inputs.prompts[row] for row in rows]

    def _requests(self, step: int) -> list[Request]:
        """This process's completions of the step."""
        # A prompt's number within the step, not its row, identifies it: a row that comes twice in
        # a step gets two different completions.
        requests = [
            Request(
                prompt_index=number,
                sample_index=sample,
                prompt_ids=prompt.prompt_ids,
                teacher_prompt_ids=prompt.teacher_prompt_ids,
                seed=completion_seed(self.config.train.seed, step, number, sample),
            )
            for number, prompt in enumerate(self.prompts(step))
            for sample in range(self.config.rollout.per_prompt)
        ]
        return requests[self.accelerator.process_index :: self.accelerator.num_processes]

    def sample(self, step: int) -> Iterator[Rollout]:
        """This process's completions of a step, as they end, by the student as it is now."""
        return self.engine.generate(self._requests(step), self.sampling)

    def scored(self, rollouts: Iterable[Rollout], prompts: Sequence[Prompt]) -> list[Example]:
        """Completions as the updater takes them: what is trained on, with the teacher's scores."""
        list(self._submitted(rollouts, prompts))
        return self._collected()[0]

    def _submitted(
        self, rollouts: Iterable[Rollout], prompts: Sequence[Prompt]
    ) -> Iterator[Rollout]:
        """Yields completions as they end, each already on its way to the teacher."""
        inputs, policy = self.inputs, self.config.objective.stop
        for rollout in rollouts:
            prompt = prompts[rollout.prompt_index]
            if self.task_rewards is not None:
                self.task_rewards.submit(rollout, prompt)
            teacher_stop_ids = inputs.teacher_stop_ids(prompt.domain)
            example = make_example(rollout, inputs.student_stop_ids, teacher_stop_ids, policy)
            if example is not None:
                self.teacher.submit(replace(example, domain=prompt.domain, row=prompt.index))
            yield rollout

    def _collected(self) -> tuple[list[Example], list[float]]:
        """The submitted examples, scored, in an order that does not depend on who ended first.

        And the task rewards of all completions, where the recipe has one.
        """
        scored = self._together(self.teacher.collect)
        examples = sorted(scored, key=lambda e: e.rollout.place)
        if self.task_rewards is None:
            return examples, []
        found, weight = self.task_rewards.collect(), self.task_rewards.weight
        examples = [replace(e, bonus=weight * found[e.rollout.place]) for e in examples]
        return examples, list(found.values())

    def _together(self, work: Callable[[], T]) -> T:
        """What `work` gives in this process.

        Where it fails in one of them, all raise that RunError, with the steps before this one in a
        checkpoint.
        """
        done, failure = None, ""
        try:
            done = work()
        except RunError as error:
            failure = str(error)
        failures = [text for text in gather_object([failure]) if text]
        if failures or done is None:
            self.rollouts.put_back()
            if self.steps_done:
                self._save_checkpoint()
            raise RunError(failures[0])
        return done

    def student_log_probs(self, examples: Sequence[Example]) -> list[list[float]]:
        """The student's own of each example's trained tokens; all processes call it."""
        return self.updater.log_probs(examples)

    def subject(self) -> Subject:
        """The current student as something to evaluate."""
        context = context_length(self.student.model.config)
        identity = f"{self.config.model.student} after {self.steps_done} steps of {self.run.path}"
        tokenizer = self.inputs.tokenizer
        return Subject(self.engine, tokenizer, self.sampling.stop_ids, context, identity)

    def _metrics(
        self,
        step: int,
        rollouts: list[Rollout],
        task_rewards: list[float],
        outcome: UpdateOutcome | None,
        clock: StepClock,
    ) -> MetricRow:
        ends = gather_object([(len(r.completion_ids), r.stopped) for r in rollouts])
        completions = completion_metrics([n for n, _ in ends], [stopped for _, stopped in ends])
        learning_rate = self.updater.learning_rate(step)
        row: MetricRow = {"step": step + 1, **completions, "learning_rate": learning_rate}
        if self.task_rewards is not None:
            found = gather_object(task_rewards)
            row["task_reward/mean"] = sum(found) / len(found)
        row |= token_metrics(outcome)
        row |= self._sampler_metrics(outcome)
        row |= self._record_rewards(step + 1, rollouts, outcome)
        row |= clock.metrics(sum(n for n, _ in ends))
        return row

    def _sampler_metrics(self, outcome: UpdateOutcome | None) -> dict[str, float]:
        metrics = {} if outcome is None else sampler_metrics(outcome.record)
        difference = metrics.get("sampler/mean_abs_difference", 0.0)
        if difference > SAMPLER_TOLERANCE and self.accelerator.is_main_process:
            logger.warning(
                "the sampler's log-probs differ from the student's by %.3f on average (more than "
                "%g): completions are not quite the student's own; see rollout.correction",
                difference,
                SAMPLER_TOLERANCE,
            )
        if self.config.rollout.correction == "none":
            metrics.pop("sampler/effective_sample_size", None)
        return metrics

    def _record_rewards(
        self, step: int, rollouts: list[Rollout], outcome: UpdateOutcome | None
    ) -> dict[str, float]:
        kept = gather_object([r for r in rollouts if self.recorder.wants(step, r)])
        if outcome is not None and self.accelerator.is_main_process:
            self.recorder.record(step, outcome.record, kept)
        return {"seconds/record": self.recorder.take_seconds()}

    def _validate(self) -> dict[str, float]:
        """Evaluates the current student where the recipe asks for it, and keeps the best one."""
        last = self.steps_done == self.config.train.steps
        if self.validation is None or not self.validation.due(self.steps_done, last):
            return {}
        metrics = self.validation.evaluate(self.subject(), self.steps_done)
        if self.validation.is_best(metrics, self.steps_done):
            self._export(self.run.best_student)
        return metrics

    def _record(self, metrics: MetricRow) -> None:
        if self.accelerator.is_main_process:
            self.run.append_metrics(metrics)
        self.accelerator.log(tracked(metrics), step=metrics["step"])

    def _end_trackers(self) -> None:
        if self.accelerator.num_processes > 1 and self.config.rollout.engine != "vllm":
            self.accelerator.end_training()
            return
        # That would end process groups, too, which vLLM in this process shares and ends at exit.
        for tracker in self.accelerator.trackers:
            tracker.finish()

    # Saving and resuming.

    def _save_checkpoint(self) -> None:
        pending = gather_object(self.rollouts.pending())
        main = self.accelerator.is_main_process
        weights = collected(self.student.trained_weights().items(), keep=main)
        optimizer = optimizer_state(self.updater.optimizer, keep=main)
        if main:
            self.recorder.write()
            checkpoint.save_checkpoint(
                self.run.checkpoints,
                self.steps_done,
                weights=weights,
                optimizer=optimizer,
                state={"max_tokens": self.updater.max_tokens, "rollouts": pending},
                keep=self.config.checkpoint.keep,
            )
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Takes up the last complete checkpoint; returns the number of steps done."""
        path = checkpoint.latest_checkpoint(self.run.checkpoints)
        steps = 0
        if path is not None:
            weights, optimizer, state = checkpoint.load_checkpoint(path)
            self.student.load_trained_weights(weights)
            load_optimizer_state(self.updater.optimizer, optimizer)
            self.updater.max_tokens = min(state["max_tokens"], self.updater.max_tokens)
            steps = state["step"]
            mine = {(r.prompt_index, r.sample_index) for r in self._requests(steps)}
            self.rollouts.restore(
                [r for r in state["rollouts"] if (r["prompt_index"], r["sample_index"]) in mine]
            )
            logger.info("resuming %s at step %d", self.run.path, steps)
        if self.accelerator.is_main_process:
            self.run.truncate_metrics(steps)
            self.recorder.truncate(steps)
        self.accelerator.wait_for_everyone()
        return steps

    def _export(self, folder: Path) -> None:
        """The student as a plain Hugging Face model directory, whole or not at all."""
        lora = self.config.model.lora
        merge = lora is not None and lora.merge
        weights = collected(self.student.exported(merge), keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            with replaced_directory(folder) as temporary:
                self.student.save(temporary, weights, list(self.sampling.stop_ids), merge)
                self.inputs.tokenizer.save_pretrained(temporary)
                card.write_card(temporary, self.config, self.steps_done)
        self.accelerator.wait_for_everyone()
