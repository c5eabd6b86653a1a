"""One optimizer step on scored examples: micro-batches, loss, gradients, clipping, AdamW.

The global number of trained tokens N is known before the first forward, so the loss is sum / N
whatever the micro-batches, their order and the processes they run on.
"""

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import get_scheduler

from poweropd import rewards
from poweropd.config import sections
from poweropd.config.fields import LEARNING_RATE_SCHEDULES
from poweropd.data.batch import Batch, collate, halved, pack
from poweropd.data.rollout import Example
from poweropd.errors import DivergedError, RunError
from poweropd.evaluation.judging import compare_batches
from poweropd.models.language_model import Student, Teacher, with_teacher
from poweropd.models.own_teacher import MovingAverage
from poweropd.models.sharding import shard, whole
from poweropd.objectives.base import Objective, TokenRecord
from poweropd.objectives.comparison import ComparedTokens
from poweropd.objectives.sampled import Sampled
from poweropd.rewards import Reward


@dataclass(frozen=True)
class UpdateOutcome:
    """What one update did, the same on every process. `record` holds all N tokens, on the CPU."""

    loss: float
    grad_norm: float
    num_tokens: int
    selected_fraction: float  # of all tokens in the loss masks
    record: TokenRecord


class Updater:
    """Owns the student, its optimizer and its learning-rate schedule."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: Student,
        train: sections.TrainConfig,
        objective: Objective,
        teacher: Teacher | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        """Takes over the student; `teacher` is given if the objective needs its hidden states.

        `average` is one of the student's weights, and follows them.
        """
        self.accelerator, self.train, self.objective = accelerator, train, objective
        self.teacher, self.average = teacher, average
        self.max_tokens = train.max_tokens_per_batch
        self.flat = student.flat, teacher is not None and teacher.flat
        self.student = student
        if train.sharding == "fsdp2" and accelerator.num_processes > 1:
            shard(student, student.layers, student.compute_dtype)
        else:
            self.student = accelerator.prepare(student)
        self.optimizer = torch.optim.AdamW(
            [p for p in student.parameters() if p.requires_grad],
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            fused=True,
        )
        # Only its factor is used, as a pure function of the step: a state would have to be resumed.
        name = LEARNING_RATE_SCHEDULES[train.schedule]
        schedule = get_scheduler(name, self.optimizer, train.warmup_steps, train.steps)
        self._factor = schedule.lr_lambdas[0]

    def update(
        self, examples: Sequence[Example], reward: Reward, step: int
    ) -> UpdateOutcome | None:
        """Optimizer step `step` (from 0) on this process's share of the step's examples.

        Returns None, with nothing changed, where no process has a trained token.
        """
        lengths = gather_object([e.num_tokens for e in examples])
        num_tokens = self.objective.num_tokens(lengths)
        if num_tokens == 0:
            return None
        loss, record = self.accumulate_fitting(examples, reward, num_tokens)
        record = _check_finite(TokenRecord.cat(gather_object([record])), reward)
        clip = self.train.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(
            self.student.parameters(), float("inf") if clip is None else clip
        )
        grad_norm = float(whole(norm))
        if not math.isfinite(grad_norm):
            raise DivergedError(
                f"the gradient of step {step + 1} is not finite (norm {grad_norm}): lower "
                "train.learning_rate, or compute in another model.dtype"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()  # frees them for the rollout
        if self.average is not None:
            self.average.update()
        return UpdateOutcome(loss, grad_norm, num_tokens, num_tokens / sum(lengths), record)

    def accumulate_fitting(
        self, examples: Sequence[Example], reward: Reward, num_tokens: int
    ) -> tuple[float, TokenRecord]:
        """Accumulates as `accumulate` does; starts again with smaller batches if memory is short.

        Raises RunError if it never suffices.
        """
        while True:
            try:
                return self.accumulate(examples, reward, num_tokens)
            except torch.OutOfMemoryError as error:
                self._shrink(examples, error)

    def accumulate(
        self, examples: Sequence[Example], reward: Reward, num_tokens: int
    ) -> tuple[float, TokenRecord]:
        """Accumulates this rank's gradient of the global loss.

        Returns the global loss and the record of this rank's tokens.
        """
        self.optimizer.zero_grad()
        batches = self._micro_batches(examples)
        if reward.needs_statistics:
            reward = self._with_statistics(batches, reward)
        # Gradients are averaged over processes, so each process's share of sum / N is scaled up.
        world = self.accelerator.num_processes
        token_weight = world / num_tokens
        losses, records = [], []
        for number, collated in enumerate(batches):
            last, batch = number == len(batches) - 1, self._prepared(collated)
            # A sharded student has no such context: see `shard`.
            with nullcontext() if last else self.accelerator.no_sync(self.student):
                token_weights = token_weight * batch.loss_weights
                loss, record = self.student(batch, self.objective, reward, token_weights)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
            records.append(record)
        total = self.accelerator.reduce(torch.stack(losses).double().sum(), "sum")
        return total.item() / world, TokenRecord.cat(records)

    def with_objective(self, objective: Objective, teacher: Teacher) -> "Updater":
        """Returns an updater of the same student whose gradients are those of another objective."""
        other = copy.copy(self)
        other.objective, other.teacher = objective, teacher
        other.flat = self.flat[0], teacher.flat
        return other

    def standardized(self, examples: Sequence[Example], reward: Reward) -> Reward:
        """Returns a reward with the statistics that it needs, over the tokens of examples."""
        return self._with_statistics(self._micro_batches(examples), reward)

    def compare(
        self, examples: Sequence[Example], teacher: Teacher | None, stop_ids: Sequence[int]
    ) -> ComparedTokens:
        """Compares the student with a teacher in this process, in micro-batches.

        Returns the record of this process's tokens, on the CPU. All processes call it, each with
        its own examples, or none. Without a teacher, only the student's half is known. All
        `stop_ids` are one action.
        """
        flat, device = teacher is not None and teacher.flat, self.accelerator.device
        while True:
            batches = self._micro_batches(examples, flat)
            try:
                return compare_batches(self.student, batches, teacher, stop_ids, device)
            except torch.OutOfMemoryError as error:
                self._shrink(examples, error)

    def _micro_batches(
        self, examples: Sequence[Example], teacher_flat: bool | None = None
    ) -> list[Batch]:
        """Packs examples; `teacher_flat` is how the teacher takes them if not as in training."""
        flat, other = self.flat
        other = other if teacher_flat is None else teacher_flat
        groups = pack([e.student_length for e in examples], self.max_tokens, flat)
        batches = [collate([examples[i] for i in group], flat, other) for group in groups]
        # A collective backward needs the same number on every process.
        most = max(gather_object([len(batches)]))
        return batches + [collate([]) for _ in range(most - len(batches))]

    def _prepared(self, batch: Batch) -> Batch:
        batch = batch.to(self.accelerator.device)
        return batch if self.teacher is None else with_teacher(batch, self.teacher)

    @torch.no_grad()
    def _with_statistics(self, batches: Sequence[Batch], reward: Reward) -> Reward:
        """The reward given the mean and population std of its base over all N tokens."""
        base = reward.unstandardized
        records = [
            self.student(self._prepared(batch), self.objective, base, 0.0)[1] for batch in batches
        ]
        rewards = TokenRecord.cat(gather_object([TokenRecord.cat(records)])).rewards.double()
        return reward.with_statistics(rewards.mean().item(), rewards.std(correction=0).item())

    def _shrink(self, examples: Sequence[Example], error: torch.OutOfMemoryError) -> None:
        """Prepares a restart of the whole update at half the token budget, or gives up."""
        lengths = [e.student_length for e in examples]
        smaller = halved(self.max_tokens, lengths)
        if self.accelerator.num_processes > 1 or smaller is None:
            raise RunError(
                f"out of memory in an update with train.max_tokens_per_batch={self.max_tokens} "
                f"(longest sequence: {max(lengths, default=0)} tokens): lower it or "
                "rollout.max_new_tokens, or set model.gradient_checkpointing=true"
            ) from error
        self.max_tokens = smaller
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def log_probs(self, examples: Sequence[Example]) -> list[list[float]]:
        """The student's log-probs of each example's trained tokens, in one batch.

        With several processes all of them call it: the student may be sharded.
        """
        scored = [e.scored(torch.zeros(e.num_tokens)) for e in examples]
        batch = collate(scored).to(self.accelerator.device)
        _, record = self.student(batch, Sampled(), rewards.create("log_ratio"), 0.0)
        parts = record.student_log_probs.split([e.num_tokens for e in examples])
        return [part.tolist() for part in parts]

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return self.train.learning_rate * self._factor(step)


def _check_finite(record: TokenRecord, reward: Reward) -> TokenRecord:
    bad = ~record.rewards.isfinite()
    if bad.any():
        first = {name: values[bad][0].item() for name, values in vars(record).items()}
        raise DivergedError(
            f"reward {reward} is {first['rewards']} at completion position "
            f"{first['positions']:.0f} (log-prob of the teacher {first['teacher_log_probs']:.6g}, "
            f"of the student {first['student_log_probs']:.6g}): use a bounded reward such as "
            "power, or clip"
        )
    return record
