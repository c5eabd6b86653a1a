"""The training loop: prompts, rollout, score, update, sync; `Trainer.step` reads in that order."""

import logging
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed

from poweropd.config import Config
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Example, Request, Rollout, make_example
from poweropd.errors import RunError, UsageError
from poweropd.evaluation.runner import Subject
from poweropd.models import sharding
from poweropd.models.loading import context_length
from poweropd.models.sharding import collected, load_optimizer_state, optimizer_state
from poweropd.rollouts.factory import build_schedule
from poweropd.runs import card
from poweropd.runs.directory import RunDirectory
from poweropd.runs.files import replaced_directory
from poweropd.runs.metrics import StepMetrics, tracked
from poweropd.runs.recorder import RewardRecorder
from poweropd.teachers.manifest import TeacherManifest
from poweropd.training import build, checkpoint, export, signals, trackers
from poweropd.training.accounting import StepClock
from poweropd.training.build import RunInputs
from poweropd.training.metrics import (
    FIRST_STEPS,
    gathered_completions,
    grade_metrics,
    halted,
    hints,
    mixture_metrics,
    sampler_metrics,
    schedule_metrics,
    token_metrics,
    warn_of_sampler,
)
from poweropd.training.progress import TrainingProgress
from poweropd.training.update import UpdateOutcome
from poweropd.training.validation import make_judges, teacher_subject

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
        sharding.check_launch()
        trackers.check_trackers(config.log.trackers)
        self.accelerator = Accelerator(
            log_with=config.log.trackers or None,
            project_config=ProjectConfiguration(config.run.dir, f"{config.run.dir}/trackers"),
        )
        main = self.accelerator.is_main_process
        self.reward = config.reward.create()
        self.inputs = inputs = RunInputs.load(config, notify=progress and main)
        self.config = config = config.with_steps(len(self.inputs.prompts))
        self.validation = build.make_validation(config, self.accelerator, self.inputs)
        with self.accelerator.main_process_first():
            self.run = RunDirectory.open(config)
        self.progress = TrainingProgress(config, self.run, progress, main)
        with self._alone():
            if self.accelerator.is_main_process:
                judged = [] if self.validation is None else self.validation.judged
                self.run.check_inputs(build.input_fingerprints(config, self.inputs, judged))
        set_seed(config.train.seed)  # a fresh LoRA adapter is random
        self.models = build.load_models(config, self.inputs, self.accelerator.device)
        self.student = self.models.student
        self.feedback = build.make_feedback(config, inputs, self.validation)
        parts = (self.models, self.run, self.accelerator, self.feedback)
        self.teacher = build.make_teacher(config, inputs, *parts)
        self.engine = build.make_engine(
            config, self.inputs, self.student, self.accelerator, self.student_log_probs
        )
        self.updater = build.make_updater(config, self.models, self.inputs, self.accelerator)
        teachers = (self.inputs.teachers, self.models.teachers, self.updater.compare)
        together = self._raising_together
        self.judges = make_judges(config, *teachers, self.accelerator, together, self.feedback)
        self.sampling = build.make_sampling(config, self.inputs)
        export.rehearse(self.student, self.inputs.tokenizer, list(self.sampling.stop_ids))
        self.asked = build.step_requests(config, inputs, self.accelerator)
        self.rollouts = build_schedule(config, self.engine, self.sample)
        self.task_rewards = build.make_task_rewards(config, self.inputs)
        self.manifest = TeacherManifest(config, main)
        self.recorder = RewardRecorder(self.run.rewards, self.inputs.tokenizer.decode)
        self.utilization = build.make_utilization(config, self.models)
        self.steps_done = self._resume()
        self.engine.sync()
        options = trackers.tracker_options(config.log.trackers, self.run.path)
        self.accelerator.init_trackers("poweropd", config.flat_text(), options)

    @signals.advised()
    def train(self, until: int | None = None) -> Result:
        """Does the remaining steps, or those before step `until`.

        SIGINT and SIGTERM let the step finish and write a checkpoint.
        """
        steps, every = self.config.train.steps, self.config.checkpoint.every
        end = steps if until is None else min(until, steps)
        if self.run.is_complete:
            logger.info("%s is complete: nothing to do", self.run.path)
            return Result(self.run.path, self.run.steps_done(), self.run.final)
        with self._alone(), self.progress, self.recorder, signals.deferred() as received:
            self._check_place()
            self.progress.begin(self.steps_done, self.inputs.opening(self.config))
            self._evaluate_teacher()
            if not self.steps_done and (before := self._validate()):
                self.accelerator.log(before, step=0)  # and no row of metrics.jsonl
            while self.steps_done < end:
                metrics = self.step(self.steps_done)
                self.steps_done += 1
                metrics |= self._validate()
                self._record(metrics)
                self._hint(metrics)
                self.progress.update(self.steps_done, metrics)
                interrupted = any(gather_object([bool(received)]))
                if interrupted or self.steps_done % every == 0 or self.steps_done == end:
                    self._save_checkpoint()
                if interrupted and self.steps_done < steps:
                    self.progress.stopped(self.steps_done)
                    number = received[0] if received else signal.SIGTERM  # another process's
                    return Result(self.run.path, self.steps_done, None, number)
            if self.steps_done < steps:
                return Result(self.run.path, self.steps_done, None)
            self._export(self.run.final)
            self.progress.finished(self.steps_done)
        trackers.end_trackers(self.accelerator, self.config.rollout.engine)
        return Result(self.run.path, self.steps_done, self.run.final)

    def _alone(self) -> AbstractContextManager[object]:
        """Keeps other processes out of the run directory; the main process does it for all."""
        return self.run.locked() if self.accelerator.is_main_process else nullcontext()

    def _check_place(self) -> None:
        """Raises UsageError if the run directory is not where this trainer left it."""
        if self.accelerator.is_main_process and self.run.steps_done() != self.steps_done:
            raise UsageError(
                f"run.dir: {self.run.path} holds {self.run.steps_done()} steps, this process knows "
                f"of {self.steps_done}: another one has trained in it; run the command again"
            )

    def step(self, step: int) -> StepMetrics:
        """Does one optimizer step, counted from 0, and returns its metrics."""
        clock = StepClock(self.accelerator.device)
        with clock.phase("rollout"):
            rollouts = self._sample_and_submit(step)
            self.progress.sampled(step, rollouts, self.inputs.tokenizer)
        with clock.phase("score"):
            examples = self._collect()
        with clock.phase("update"):
            outcome = self.updater.update(examples, self.reward.at(step), step)
        self.manifest.count(examples)
        try:
            with clock.phase("rollout"), self._raising_together():
                self.rollouts.finish()
        except RunError:  # this step is done, whatever became of a later one's completions
            self._keep(step, self._metrics(step, rollouts, examples, outcome, clock))
            raise
        with clock.phase("sync"):
            self.engine.sync()
        return self._metrics(step, rollouts, examples, outcome, clock)

    def _keep(self, step: int, metrics: StepMetrics) -> None:
        """Records a step behind which the run ends, and writes a checkpoint of it."""
        self.steps_done = step + 1
        self._record(metrics)
        self._save_checkpoint()

    def prompts(self, step: int) -> list[Prompt]:
        """Returns the prompts of a step, over all processes."""
        return self.asked.prompts(step)

    def requests(self, step: int) -> list[Request]:
        """Returns this process's share of the requests of a step."""
        return self.asked.requests(step)

    def sample(self, step: int) -> Iterator[Rollout]:
        """Yields this process's completions of a step: a file's, then sampled ones as they end."""
        yield from self.asked.given(step).values()
        sampling = self.asked.sampling(step, self.sampling)
        yield from self.engine.generate(self.asked.sampled(step), sampling)

    def scored(self, rollouts: Iterable[Rollout]) -> list[Example]:
        """Makes examples of completions, with the teacher's scores, as the updater takes them."""
        for rollout in rollouts:
            self._submit(rollout)
        return self._collect()

    def _sample_and_submit(self, step: int) -> list[Rollout]:
        """Samples a step's completions; each goes to the teacher as it ends."""
        rollouts = []
        with self._failing_together():
            for rollout in self.rollouts.take(step):
                self._submit(rollout)
                rollouts.append(rollout)
        self.rollouts.begin(step)
        return rollouts

    def _submit(self, rollout: Rollout) -> None:
        """Sends a completion to the task reward and, if any of it is trained, to the teacher."""
        if self.task_rewards is not None:
            self.task_rewards.submit(rollout)
        own, teachers = self.inputs.student_stop_ids, self.inputs.teacher_stop_ids
        domain = rollout.request.prompt.domain
        example = make_example(rollout, own, teachers(domain), self.config.objective.stop)
        if example is not None:
            self.teacher.submit(example)

    def _collect(self) -> list[Example]:
        """Collects the submitted examples in an order that does not depend on who ended first."""
        with self._failing_together():
            scored = self.teacher.collect()
        examples = sorted(scored, key=lambda e: e.rollout.key)
        return examples if self.task_rewards is None else self.task_rewards.added_to(examples)

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Raises a RunError of any process in all of them, after a checkpoint of the steps done."""
        try:
            with self._raising_together():
                yield
        except RunError:
            self.rollouts.put_back()
            if self.steps_done:
                self._save_checkpoint()
            raise

    @contextmanager
    def _raising_together(self) -> Iterator[None]:
        """Raises a RunError of any process in all of them."""
        failure: RunError | None = None
        try:
            yield
        except RunError as error:
            failure = error
        failures = [error for error in gather_object([failure]) if error is not None]
        if failures:
            raise failures[0]

    def student_log_probs(self, examples: Sequence[Example]) -> list[list[float]]:
        """Returns the student's log-probs of all trained tokens; every process must call it."""
        return self.updater.log_probs(examples)

    def subject(self) -> Subject:
        """Returns the current student as something to evaluate."""
        context = context_length(self.student.model.config)
        identity = f"{self.config.model.student} after {self.steps_done} steps of {self.run.path}"
        tokenizer = self.inputs.tokenizer
        return Subject(self.engine, tokenizer, self.sampling.stop_ids, context, identity)

    def _metrics(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        examples: Sequence[Example],
        outcome: UpdateOutcome | None,
        clock: StepClock,
    ) -> StepMetrics:
        """Returns the step's line of metrics.jsonl, the same on every process but for times."""
        completions, sampled, given = gathered_completions(rollouts)
        learning_rate = self.updater.learning_rate(step)
        metrics: StepMetrics = {"step": step + 1, **completions, "learning_rate": learning_rate}
        metrics |= grade_metrics(self.task_rewards, self.feedback)
        metrics |= schedule_metrics(self.config.rollout, step)
        metrics |= token_metrics(outcome, [prompt.domain for prompt in self.prompts(step)])
        metrics |= mixture_metrics(self.teacher)
        metrics |= sampler_metrics(outcome, self.config.rollout, given)
        if self.accelerator.is_main_process:
            warn_of_sampler(metrics)
        metrics |= self._record_rewards(step + 1, rollouts, outcome)
        metrics |= clock.metrics(sampled)
        return metrics | (self.utilization.metrics(examples, clock) if self.utilization else {})

    def _record_rewards(
        self, step: int, rollouts: Sequence[Rollout], outcome: UpdateOutcome | None
    ) -> dict[str, float]:
        """Records the step's reward statistics and a few completions; returns the time it took."""
        kept = gather_object([r for r in rollouts if self.recorder.wants(step, r)])
        if outcome is not None and self.accelerator.is_main_process:
            self.recorder.record(step, outcome.record, kept)
        return {"seconds/record": self.recorder.take_seconds()}

    def _evaluate_teacher(self) -> None:
        """Evaluates the teacher itself if the recipe asks for it, once in a run."""
        wanted = self.validation is not None and self.validation.section.teacher
        if self.validation is None or not wanted or self.run.teacher_evaluation():
            return
        own = (self.inputs.teachers[""], self.models.teachers.get(""), self.accelerator.device)
        with self._failing_together(), teacher_subject(self.config, *own) as subject:
            metrics = self.validation.evaluate_teacher(subject, self.progress.say)
            self.accelerator.log(metrics, step=0)
            self.progress.evaluated_teacher()
        self.accelerator.wait_for_everyone()

    def _validate(self) -> dict[str, float]:
        """Evaluates the current student if the recipe asks for it, and keeps the best one."""
        last = self.steps_done == self.config.train.steps
        if self.validation is None or not self.validation.due(self.steps_done, last):
            return {}
        say = self.progress.say
        metrics = self.validation.evaluate(self.subject(), self.steps_done, self.judges, say)
        self.progress.evaluated(self.steps_done)
        if self.steps_done and self.validation.is_best(metrics, self.steps_done):
            self._export(self.run.best_student)
        return metrics

    def _record(self, metrics: StepMetrics) -> None:
        """Writes a step's metrics to the run directory and to the trackers."""
        if self.accelerator.is_main_process:
            self.run.append_metrics(metrics)
        self.accelerator.log(tracked(metrics), step=metrics["step"])

    def _hint(self, metrics: StepMetrics) -> None:
        """Warns if nothing can be learned from the first steps, or later ones train nothing."""
        judged = self.steps_done == min(FIRST_STEPS, self.config.train.steps)
        if self.accelerator.is_main_process and (judged or not metrics["num_tokens"]):
            rows = self.run.metrics()
            for text in hints(rows, self.config) if judged else halted(rows):
                logger.warning("%s", text)

    # Saving and resuming.

    def _save_checkpoint(self) -> None:
        """Writes a checkpoint of the steps done; all processes call it."""
        pending, teachers = gather_object(self.rollouts.pending()), self.manifest.rows()
        state = {"max_tokens": self.updater.max_tokens, "rollouts": pending, "teachers": teachers}
        main = self.accelerator.is_main_process
        weights = collected(self.models.trained_weights().items(), keep=main)
        optimizer = optimizer_state(self.updater.optimizer, keep=main)
        if main:
            self.recorder.write()
            checkpoint.save_checkpoint(
                self.run.checkpoints,
                self.steps_done,
                weights=weights,
                optimizer=optimizer,
                state=state,
                keep=self.config.checkpoint.keep,
            )
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Takes up the last complete checkpoint and returns the number of steps done."""
        found, steps = checkpoint.load_latest(self.run.checkpoints), 0
        if found is not None:
            weights, optimizer, state = found
            self.models.load_trained_weights(weights)
            load_optimizer_state(self.updater.optimizer, optimizer)
            self.updater.max_tokens = min(state["max_tokens"], self.updater.max_tokens)
            steps = state["step"]
            # Checkpoints from before a staleness of 2 hold the next step alone and do not name it.
            rows = [{"step": steps, **row} for row in state["rollouts"]]
            self.rollouts.restore(rows, self.requests)
            self.manifest.restore(state.get("teachers", []))
            logger.info("resuming %s at step %d", self.run.path, steps)
        with self._alone():
            # A complete run is kept as it is, also if its checkpoints were removed.
            if self.accelerator.is_main_process and not self.run.is_complete:
                self.run.truncate_metrics(steps)
                self.recorder.truncate(steps)
        self.accelerator.wait_for_everyone()
        return steps

    def _export(self, folder: Path) -> None:
        """Writes the student as a plain Hugging Face model directory, whole or not at all."""
        lora, main = self.config.model.lora, self.accelerator.is_main_process
        merge = lora is not None and lora.merge
        probe = export.make_probe(self.inputs.prompts[0].prompt_ids, self.student)
        log_probs = self.student_log_probs([probe])
        weights = collected(self.student.exported(merge), keep=main)
        teachers = self.manifest.rows()
        with self._failing_together():
            if main:
                with replaced_directory(folder) as temporary:
                    self.student.save(temporary, weights, list(self.sampling.stop_ids), merge)
                    export.save_tokenizer(self.inputs.tokenizer, temporary)
                    export.verify(temporary, self.student, self.config.model, [probe], log_probs)
                    card.write_card(temporary, self.config, self.steps_done, teachers)
        self.accelerator.wait_for_everyone()
