"""A teacher behind vLLM servers, which score each completion while others are still sampled."""

import logging
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd.config.teachers import TeacherConfig
from poweropd.data.rollout import Example
from poweropd.errors import RunError, UsageError
from poweropd.net import start, wait
from poweropd.teachers.pool import TOLERANCE, Pool

logger = logging.getLogger("poweropd")

NUM_CHECKED = 10  # sequences that are scored twice before a run starts


class TargetScores(NamedTuple):
    """What servers say of an example's n targets."""

    log_probs: Tensor  # [n] float32
    greedy: Tensor  # [n] int64, the most probable ids; the targets if they were not asked for


class ServerTeacher:
    """Scores on the servers of a `teacher` section, which all serve the same model.

    Log-probs are vLLM's raw ones: of the full softmax at temperature 1.
    """

    def __init__(self, section: TeacherConfig) -> None:
        self.urls = ", ".join(section.servers)
        self.pool = pool = Pool(section)
        self._waiting: list[tuple[Example, Future[TargetScores]]] = []
        weakref.finalize(self, lambda: start(pool.close())).atexit = False

    def submit(self, example: Example) -> None:
        self._waiting.append((example, start(_scored(self.pool, example))))

    def collect(self) -> list[Example]:
        waiting, self._waiting = self._waiting, []
        scores = self._results([future for _, future in waiting])
        pairs = zip(waiting, scores, strict=True)
        return [example.scored(log_probs) for (example, _), (log_probs, _) in pairs]

    def greedily(self, examples: Sequence[Example], stop_ids: Sequence[int]) -> list[TargetScores]:
        """Scores examples at once; the teacher's most probable id of each context comes along.

        All `stop_ids` are one id, the smallest of them. The server tells of its most probable ids,
        so a sum over stop ids lacks those that are less probable than as many others.
        """
        return self._results([start(_scored(self.pool, e, frozenset(stop_ids))) for e in examples])

    def _results(self, futures: Sequence[Future[TargetScores]]) -> list[TargetScores]:
        """Waits for scores, after which every server must still be what it was."""
        try:
            scores = [future.result() for future in futures]
            # A server may have become another model since the first of these was scored.
            wait(self.pool.recognize_all())
            return scores
        finally:
            for future in futures:
                future.cancel()  # after an error; a future that is done stays as it is

    # At the start of a run.

    def context(self) -> int:
        """Returns the length in tokens of the longest sequence that every server scores.

        Raises RunError if a server is not there, UsageError if it serves another model.
        """
        contexts = [wait(server.context()) for server in self.pool.servers]
        return min(contexts) - 1  # a server insists on generating one token

    def vocab_size(self, student_size: int, num_tokens: int) -> int:
        """Returns how many ids the student may use.

        They are all ids of its embeddings, `student_size`, or only the tokenizer's, `num_tokens`.
        """
        for size in (student_size, num_tokens):
            if wait(self.pool.takes(size - 1)):
                return size
        raise UsageError(
            f"teacher.servers: {self.urls} does not know id {num_tokens - 1}, but the student's "
            f"vocabulary has {num_tokens} tokens: serve a teacher that shares it"
        )

    def check(self, sequences: Sequence[list[int]]) -> None:
        """Raises RunError if sequences that every server scores twice get different log-probs."""
        difference = wait(self.pool.check(sequences[:NUM_CHECKED]))
        if difference > TOLERANCE:
            raise RunError(
                f"teacher server {self.urls}: the same prompt, scored twice, got log-probs that "
                f"differ by {difference:.3g} on average (more than {TOLERANCE}): do all of "
                "teacher.servers serve the same weights?"
            )
        logger.info("teacher: %s; prompts scored twice differ by %.2g nats", self.urls, difference)


async def _scored(
    pool: Pool, example: Example, merged_ids: frozenset[int] | None = None
) -> TargetScores:
    """Returns the scores of the example's targets."""
    ids = sequence(example)
    what = f"the {len(ids)} tokens of data.prompts row {example.prompt.index} and its completion"
    scores = await pool.score(ids, what, merged_ids)
    first = len(example.prompt.teacher_prompt_ids) - 1  # of the completion, in the scores
    places = [first + i for i in example.positions.tolist()]
    log_probs, greedy = ([column[i] for i in places] for column in scores)
    return TargetScores(torch.tensor(log_probs), torch.tensor(greedy))


def sequence(example: Example) -> list[int]:
    """Returns the teacher's prompt and its targets, up to the last trained one.

    A stop policy gives the teacher another target than the completion's id at its end alone, so
    no token is read after a replaced one.
    """
    prompt, completion = example.prompt.teacher_prompt_ids, example.rollout.completion_ids
    ids = [*prompt, *completion[: int(example.positions[-1]) + 1]]
    for i, target in zip(example.positions.tolist(), example.teacher_targets.tolist(), strict=True):
        ids[len(prompt) + i] = target
    return ids
