"""A teacher behind servers, which score each completion while others are still sampled."""

import logging
import math
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd.config.teachers import TeacherConfig
from poweropd.data.rollout import Example, TopIds
from poweropd.errors import RunError, UsageError
from poweropd.net import start, wait
from poweropd.teachers.pool import TOLERANCE, Pool
from poweropd.teachers.protocols import Query, Told, most_probable

logger = logging.getLogger("poweropd")

NUM_CHECKED = 10  # sequences that are scored twice before a run starts
MOST_OTHERS = 20  # ids of a context that vLLM tells of unless it is started with more


class TargetScores(NamedTuple):
    """What servers say of an example's n targets."""

    log_probs: Tensor  # [n] float32
    greedy: Tensor  # [n] int64, the most probable ids of the contexts


class ServerTeacher:
    """Scores on the servers of a `teacher` section, which all serve the same model.

    Log-probs are of the full softmax at temperature 1. With a `top_k` they come with those of the
    so many most probable ids of each context.
    """

    def __init__(self, section: TeacherConfig, top_k: int | None = None) -> None:
        self.urls, self.top_k = ", ".join(section.servers), top_k
        self.pool = pool = Pool(section)
        self._waiting: list[tuple[Example, Future[list[Told]]]] = []
        weakref.finalize(self, lambda: start(pool.close())).atexit = False

    def submit(self, example: Example) -> None:
        self._waiting.append((example, start(_told(self.pool, example, self.top_k or 0))))

    def collect(self) -> list[Example]:
        waiting, self._waiting = self._waiting, []
        found = self._results([future for _, future in waiting])
        pairs = zip(waiting, found, strict=True)
        return [self._scored(example, told) for (example, _), told in pairs]

    def _scored(self, example: Example, told: list[Told]) -> Example:
        """Returns the example with what a server has told of its n targets."""
        targets = example.teacher_targets.tolist()
        log_probs = torch.tensor([each[i] for i, each in zip(targets, told, strict=True)])
        if self.top_k is None:
            return example.scored(log_probs)
        pairs = torch.tensor([most_probable(each, self.top_k) for each in told], dtype=torch.double)
        top = TopIds(pairs[..., 0].long(), pairs[..., 1].float())
        return example.scored(log_probs, teacher_top=top)

    def greedily(self, examples: Sequence[Example], stop_ids: Sequence[int]) -> list[TargetScores]:
        """Scores examples at once; the teacher's most probable id of each context comes along.

        All `stop_ids` are one id, the smallest of them. The server tells of its most probable ids,
        so a sum over stop ids lacks those that are less probable than as many others.
        """
        merged = frozenset(stop_ids)
        top = min(1 + len(merged), MOST_OTHERS)
        found = self._results([start(_told(self.pool, e, top)) for e in examples])
        return [_greedy(e, told, merged) for e, told in zip(examples, found, strict=True)]

    def _results(self, futures: Sequence[Future[list[Told]]]) -> list[list[Told]]:
        """Waits for scores, after which every server must still be what it was."""
        try:
            found = [future.result() for future in futures]
            # A server may have become another model since the first of these was scored.
            wait(self.pool.recognize_all())
            return found
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
        """Raises RunError if sequences that every server scores twice get different log-probs.

        The same holds for log-probs with and without a prefix cache. Raises UsageError if a server
        gives fewer of the most probable ids than it will be asked for.
        """
        repeated, cached = wait(self.pool.check(sequences[:NUM_CHECKED]))
        if repeated > TOLERANCE:
            raise RunError(
                f"teacher server {self.urls}: the same prompt, scored twice, got log-probs that "
                f"differ by {repeated:.3g} on average (more than {TOLERANCE}): do all of "
                "teacher.servers serve the same weights?"
            )
        if cached > TOLERANCE:
            raise RunError(
                f"teacher server {self.urls}: a prompt scored from the prefix cache got log-probs "
                f"that differ by {cached:.3g} on average (more than {TOLERANCE}) from those "
                "without it: the cache is of other weights; flush it, or start the server again"
            )
        if self.top_k is not None:
            wait(self.pool.check_top(sequences[0], self.top_k))
        logger.info("teacher: %s; prompts scored twice differ by %.2g nats", self.urls, repeated)


async def _told(pool: Pool, example: Example, top: int) -> list[Told]:
    """Returns what a server tells of the example's targets."""
    ids = sequence(example)
    what = f"the {len(ids)} tokens of data.prompts row {example.prompt.index} and its completion"
    told = await pool.score(Query(ids, len(example.prompt.teacher_prompt_ids), top), what)
    return [told[i] for i in example.positions.tolist()]


def _greedy(example: Example, told: Sequence[Told], merged_ids: frozenset[int]) -> TargetScores:
    """Returns the example's scores with all merged ids as one, the smallest of them."""
    log_probs, greedy = [], []
    for token, each in zip(example.teacher_targets.tolist(), told, strict=True):
        found = {i: log_prob for i, log_prob in each.items() if i not in merged_ids}
        merged = [log_prob for i, log_prob in each.items() if i in merged_ids]
        if merged:
            probability = sum(math.exp(log_prob) for log_prob in merged)
            found[min(merged_ids)] = math.log(probability) if probability else -math.inf
        log_probs.append(found[min(merged_ids) if token in merged_ids else token])
        greedy.append(max(found, key=found.__getitem__))
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
