"""A teacher behind vLLM servers, which score each completion while others are still sampled."""

import logging
import weakref
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from poweropd.config.sections import TeacherConfig
from poweropd.data.rollout import Example
from poweropd.errors import RunError, UsageError
from poweropd.net import start, wait
from poweropd.teachers.pool import TOLERANCE, Pool

logger = logging.getLogger("poweropd")

NUM_CHECKED = 10  # sequences that are scored twice before a run starts


class ServerTeacher:
    """Scores on the servers of a `teacher` section, which all serve the same model.

    Log-probs are vLLM's raw ones: of the full softmax at temperature 1.
    """

    def __init__(self, section: TeacherConfig) -> None:
        self.urls = ", ".join(section.servers)
        self.pool = pool = Pool(section)
        self._waiting: list[tuple[Example, Future[Tensor]]] = []
        weakref.finalize(self, lambda: start(pool.close())).atexit = False

    def submit(self, example: Example) -> None:
        self._waiting.append((example, start(_scored(self.pool, example))))

    def collect(self) -> list[Example]:
        waiting, self._waiting = self._waiting, []
        try:
            scored = [example.scored(future.result()) for example, future in waiting]
            # A server may have become another model since the first of these was scored.
            wait(self.pool.recognize_all())
            return scored
        finally:
            for _, future in waiting:
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


async def _scored(pool: Pool, example: Example) -> Tensor:
    """Returns the [n] float32 log-probs of the example's targets."""
    ids = sequence(example)
    what = f"the {len(ids)} tokens of data.prompts row {example.prompt.index} and its completion"
    log_probs = await pool.score(ids, what)
    first = len(example.prompt.teacher_prompt_ids) - 1  # of the completion, in log_probs
    return torch.tensor([log_probs[first + i] for i in example.positions.tolist()])


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
