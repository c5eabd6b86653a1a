"""Rollout schedules: a step's completions are sampled on time, or one step ahead of the update.

Ahead, the completions of step s + 1 are sampled while step s is trained, so always by the weights
that the sync of step s - 1 left in the engine: which weights sample what is a function of the step
alone. What is sampled and not yet trained on belongs into the checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from poweropd.data.rollout import Request, Rollout

Sample = Callable[[int], Iterator[Rollout]]
Row = dict[str, Any]


class OnTime:
    """Staleness 0: a step's completions are sampled when the step begins."""

    def __init__(self, sample: Sample, steps: int) -> None:
        self.sample, self.steps = sample, steps

    def take(self, step: int) -> Iterable[Rollout]:
        """Returns this process's completions of a step, counted from 0."""
        return self.sample(step)

    def begin(self, step: int) -> None:
        """Starts to sample `step` if that is done ahead: only training follows until `finish`."""

    def finish(self) -> None:
        """Returns once nothing is being sampled, so that the engine's weights may change."""

    def put_back(self) -> None:
        """Keeps the step taken last, which was not trained on and will be taken again."""

    def pending(self) -> list[Row]:
        """Returns what is sampled and not taken, as JSON."""
        return []

    def restore(self, rows: Sequence[Mapping[str, Any]], requests: Sequence[Request]) -> None:
        """Takes over what was `pending` at a checkpoint and answers one of these requests."""


class Ahead(OnTime):
    """Staleness 1: a thread samples the next of `steps` steps while one is trained."""

    def __init__(self, sample: Sample, steps: int) -> None:
        super().__init__(sample, steps)
        self.ready: list[Rollout] = []
        self.taken: list[Rollout] = []
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self._running: Future[list[Rollout]] | None = None

    def take(self, step: int) -> Iterable[Rollout]:
        self.taken, self.ready = self.ready, []
        return self.taken or self.sample(step)  # nothing is ready at the first step

    def begin(self, step: int) -> None:
        if step < self.steps:
            self._running = self._thread.submit(lambda: list(self.sample(step)))

    def finish(self) -> None:
        if self._running is not None:
            self.taken = []  # they are trained on
            self.ready, self._running = self._running.result(), None

    def put_back(self) -> None:
        self.ready = self.taken

    def pending(self) -> list[Row]:
        return [
            {
                "prompt_index": rollout.request.prompt_index,
                "sample_index": rollout.request.sample_index,
                "completion_ids": rollout.completion_ids,
                "sampling_log_probs": rollout.sampling_log_probs,
                "stopped": rollout.stopped,
                "completion_mask": rollout.completion_mask,
            }
            for rollout in self.ready
        ]

    def restore(self, rows: Sequence[Mapping[str, Any]], requests: Sequence[Request]) -> None:
        asked = {request.key: request for request in requests}
        self.ready = [
            Rollout(
                asked[key],
                row["completion_ids"],
                row["sampling_log_probs"],
                row["stopped"],
                row["completion_mask"],
            )
            for row in rows
            if (key := (row["prompt_index"], row["sample_index"])) in asked
        ]
