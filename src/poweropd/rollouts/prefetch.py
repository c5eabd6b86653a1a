"""Rollout schedules: a step's completions are sampled on time, or steps ahead of the update.

With a staleness of n, the completions of step s are sampled by the weights after s - n optimizer
steps, and those of the first n + 1 steps by the weights at the start: while step s is trained, the
engine samples step s + n. It is done before its weights change, so which weights sample what is a
function of the step alone. What is sampled and not yet trained on belongs into the checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from poweropd.data.rollout import Request, Rollout, TurnCounts
from poweropd.errors import RunError

Sample = Callable[[int], Iterator[Rollout]]
Row = dict[str, Any]


class OnTime:
    """Staleness 0: a step's completions are sampled when the step begins."""

    def __init__(self, sample: Sample, steps: int, staleness: int = 0) -> None:
        self.sample, self.steps, self.staleness = sample, steps, staleness

    def take(self, step: int) -> Iterable[Rollout]:
        """Returns this process's completions of a step, counted from 0."""
        return self.sample(step)

    def begin(self, step: int) -> None:
        """Starts to sample what is sampled while `step` is trained, until `finish`."""

    def finish(self) -> None:
        """Returns once nothing is being sampled, so that the engine's weights may change.

        Raises RunError if that failed; what was sampled before is kept.
        """

    def put_back(self) -> None:
        """Keeps the step taken last, which was not trained on and will be taken again."""

    def pending(self) -> list[Row]:
        """Returns what is sampled and not taken, as JSON."""
        return []

    def restore(
        self, rows: Sequence[Mapping[str, Any]], requests: Callable[[int], Sequence[Request]]
    ) -> None:
        """Takes over what was `pending` at a checkpoint.

        `requests` returns this process's requests of a step.
        """


class Ahead(OnTime):
    """Staleness n >= 1: a thread samples the n-th next of `steps` steps while one is trained."""

    def __init__(self, sample: Sample, steps: int, staleness: int = 1) -> None:
        super().__init__(sample, steps, staleness)
        self.ready: dict[int, list[Rollout]] = {}  # by step
        self.taken: dict[int, list[Rollout]] = {}  # the step that is trained
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self._running: dict[int, Future[list[Rollout]]] = {}  # by step

    def take(self, step: int) -> Iterable[Rollout]:
        self.taken = {step: self.ready.pop(step)} if step in self.ready else {}
        # Nothing is ready at the first step.
        return self.taken[step] if self.taken else self.sample(step)

    def begin(self, step: int) -> None:
        ahead = range(step + 1, min(step + self.staleness + 1, self.steps))
        for other in (other for other in ahead if other not in self.ready):
            self._running[other] = self._thread.submit(self._sampled, other)

    def _sampled(self, step: int) -> list[Rollout]:
        return list(self.sample(step))

    def finish(self) -> None:
        running, self._running, self.taken = self._running, {}, {}  # that step is trained on
        failures = []
        for step, future in running.items():
            try:
                self.ready[step] = future.result()
            except RunError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def put_back(self) -> None:
        self.ready |= self.taken

    def pending(self) -> list[Row]:
        return [
            {
                "step": step,
                "prompt_index": rollout.request.prompt_index,
                "sample_index": rollout.request.sample_index,
                "completion_ids": rollout.completion_ids,
                "sampling_log_probs": rollout.sampling_log_probs,
                "stopped": rollout.stopped,
                "completion_mask": rollout.completion_mask,
                "off_policy": rollout.off_policy,
                "turns": rollout.turns and asdict(rollout.turns),
            }
            for step, rollouts in self.ready.items()
            for rollout in rollouts
        ]

    def restore(
        self, rows: Sequence[Mapping[str, Any]], requests: Callable[[int], Sequence[Request]]
    ) -> None:
        for step in sorted({row["step"] for row in rows}):
            asked = {request.key: request for request in requests(step)}
            found = [
                Rollout(
                    asked[key],
                    row["completion_ids"],
                    row["sampling_log_probs"],
                    row["stopped"],
                    row["completion_mask"],
                    row.get("off_policy", False),
                    TurnCounts(**turns) if (turns := row.get("turns")) else None,
                )
                for row in rows
                if row["step"] == step
                and (key := (row["prompt_index"], row["sample_index"])) in asked
            ]
            if len(found) == len(asked):  # the engine of another process may have failed
                self.ready[step] = found
