"""A teacher behind vLLM servers: a completion is sent as it ends, scores are awaited at the end.

Requests run in one event loop in a thread of their own, so that scoring overlaps sampling.
"""

import asyncio
import logging
import threading
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from poweropd.data.rollout import Example
from poweropd.errors import RunError, UsageError
from poweropd.teachers.pool import TOLERANCE, Pool, PoolSettings

logger = logging.getLogger("poweropd")

NUM_CHECKED = 10  # sequences that are scored twice before a run starts


class ServerTeacher:
    """Scores on servers that all serve one model, at `urls` such as "http://host:8000".

    Log-probs are vLLM's raw ones: of the full softmax at temperature 1.
    """

    def __init__(self, urls: Sequence[str], settings: PoolSettings) -> None:
        self.urls, self.pool = list(urls), Pool(urls, settings)
        self._waiting: list[tuple[Example, Future[Tensor]]] = []
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _close, self._loop, thread, self.pool)

    def submit(self, example: Example) -> None:
        scoring = _scored(self.pool, example)
        self._waiting.append((example, asyncio.run_coroutine_threadsafe(scoring, self._loop)))

    def collect(self) -> list[Example]:
        waiting, self._waiting = self._waiting, []
        try:
            return [example.scored(future.result()) for example, future in waiting]
        finally:
            for _, future in waiting:
                future.cancel()  # after an error; one that is done stays as it is

    # At the start of a run.

    def context(self) -> int:
        """Tokens of the longest sequence that every server scores.

        Raises RunError where a server is not there, UsageError where it serves another model.
        """
        return min(self._wait(self.pool.contexts())) - 1  # it insists on generating one token

    def vocab_size(self, rows: int, num_tokens: int) -> int:
        """How many ids the student may use: all of its `rows`, or those of the tokenizer."""
        for size in (rows, num_tokens):
            if self._wait(self.pool.takes(size - 1)):
                return size
        raise UsageError(
            f"teacher.servers: {', '.join(self.urls)} does not know id {num_tokens - 1}, but the "
            f"student's vocabulary has {num_tokens} tokens: serve a teacher that shares it"
        )

    def check(self, sequences: Sequence[list[int]]) -> None:
        """Scores sequences twice, on every server: the same numbers must come back."""
        difference = self._wait(self.pool.check(sequences[:NUM_CHECKED]))
        if difference > TOLERANCE:
            raise RunError(
                f"teacher server {', '.join(self.urls)}: the same prompt, scored twice, got "
                f"log-probs that differ by {difference:.3g} on average (more than {TOLERANCE}): "
                "do all of teacher.servers serve the same weights?"
            )
        logger.info("teacher: %s; prompts scored twice differ by %.2g nats", self.urls, difference)

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


async def _scored(pool: Pool, example: Example) -> Tensor:
    """[n] float32 log-probs of the example's targets."""
    ids = sequence(example)
    what = f"the {len(ids)} tokens of data.prompts row {example.prompt.index} and its completion"
    log_probs = await pool.score(ids, what)
    first = len(example.prompt.teacher_prompt_ids) - 1  # of the completion, in log_probs
    return torch.tensor([log_probs[first + i] for i in example.positions.tolist()])


def sequence(example: Example) -> list[int]:
    """The teacher's prompt and its targets, up to the last trained one.

    A stop policy gives the teacher another target than the completion's id at its end alone, so
    no token is read after a replaced one.
    """
    prompt, completion = example.prompt.teacher_prompt_ids, example.rollout.completion_ids
    ids = [*prompt, *completion[: int(example.positions[-1]) + 1]]
    for i, target in zip(example.positions.tolist(), example.teacher_targets.tolist(), strict=True):
        ids[len(prompt) + i] = target
    return ids


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, pool: Pool) -> None:
    async def end() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await pool.close()

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
