"""Checks that an engine's rollouts are well-formed and that its weights are current."""

import math
from collections.abc import Callable, Iterator, Sequence

from poweropd.data.rollout import Request, Rollout
from poweropd.errors import RunError
from poweropd.rollouts.base import RolloutEngine, Sampling

# Mean absolute difference of log-probabilities between an engine and the student that it has just
# taken over, by the dtype both compute in: ten times what rounding does.
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 2e-1}


class CheckedEngine:
    """An engine from outside, whose rollouts are checked before anything is trained on them.

    Raises RunError, naming the engine and the request, at the first rollout that breaks the
    protocol.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        name: str,
        vocab_size: int,
        context: int,
        masked_ids: Sequence[int] = (),
    ) -> None:
        self.engine, self.name, self.concurrent = engine, name, engine.concurrent
        self.vocab_size, self.context = vocab_size, context
        self.masked_ids = frozenset(masked_ids)

    def sync(self) -> None:
        self.engine.sync()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        missing = {request.key: request for request in requests}
        for rollout in self.engine.generate(requests, sampling):
            request = missing.pop(rollout.key, None)
            if request is None:
                raise self._error(rollout.key, "a rollout that was not asked for, or its second")
            problem = self._problem(request, rollout)
            if problem is not None:
                raise self._error(rollout.key, problem)
            yield rollout
        if missing:
            raise self._error(next(iter(missing)), f"none, nor of {len(missing) - 1} others")

    def _error(self, key: tuple[int, int], got: str) -> RunError:
        """Returns the error that names a rollout and says what came in its place."""
        return RunError(
            f"rollout.engine {self.name}: expected one whole rollout of prompt {key[0]}, sample "
            f"{key[1]}, got {got}"
        )

    def _problem(self, request: Request, rollout: Rollout) -> str | None:
        """Returns what is wrong with a rollout; None if nothing is."""
        ids = rollout.completion_ids
        log_probs = rollout.sampling_log_probs or [0.0] * len(ids)  # none: it does not know them
        mask = [True] * len(ids) if rollout.completion_mask is None else rollout.completion_mask
        if rollout.request != request:
            return "another request than the one that was made"
        if not ids:
            return "no completion_ids"
        if not len(ids) == len(log_probs) == len(mask):
            return (
                f"{len(ids)} completion_ids, {len(log_probs)} sampling_log_probs and a "
                f"completion_mask of {len(mask)}"
            )
        if not all(0 <= i < self.vocab_size for i in ids):
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            return f"token id {bad}, outside the vocabulary of {self.vocab_size}"
        if masked := self.masked_ids.intersection(ids):
            return f"token id {min(masked)}, which student and teacher do not share"
        if not all(math.isfinite(x) for x, own in zip(log_probs, mask, strict=True) if own):
            return "a sampling log-prob that is not finite"
        if len(request.prompt_ids) + len(ids) > self.context:
            return f"{len(ids)} tokens, more than the student's context of {self.context} holds"
        return None


class VerifiedEngine:
    """An engine with weights of its own, which are compared with the student's.

    At the first and every `every`-th sync it samples `probes`, a few short completions.
    `log_probs(rollouts)` are the student's own of the same tokens. Raises RunError if the mean
    difference is more than `tolerance`, in nats per token.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        probes: tuple[Sequence[Request], Sampling],
        log_probs: Callable[[Sequence[Rollout]], list[list[float]]],
        *,
        every: int,
        tolerance: float,
    ) -> None:
        self.engine, self.probes, self.log_probs = engine, probes, log_probs
        self.every, self.tolerance, self.concurrent = every, tolerance, engine.concurrent
        self.syncs = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        return self.engine.generate(requests, sampling)

    def sync(self) -> None:
        self.engine.sync()
        if self.syncs % self.every == 0:
            self.verify()
        self.syncs += 1

    def verify(self) -> None:
        """Raises RunError if the engine does not hold the student's weights."""
        difference = self.difference()
        if not difference <= self.tolerance:
            raise RunError(
                f"rollout engine: after sync {self.syncs + 1} its log-probs differ from the "
                f"student's by {difference:.3g} nats per token (allowed {self.tolerance:g}): it "
                "does not hold the student's weights, or computes another model; check "
                "rollout.engine, its dtype, and that nothing else writes to it"
            )

    def difference(self) -> float:
        """Returns the mean absolute difference of log-probs over freshly sampled tokens."""
        rollouts = sorted(self.engine.generate(*self.probes), key=lambda r: r.key)
        pairs = [
            (theirs, own)
            for rollout, student in zip(rollouts, self.log_probs(rollouts), strict=True)
            for theirs, own in zip(rollout.sampling_log_probs, student, strict=True)
        ]
        return sum(abs(theirs - own) for theirs, own in pairs) / len(pairs)
