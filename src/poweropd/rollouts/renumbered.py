"""An engine with a smaller vocabulary: the ids that all models share, numbered without gaps.

vLLM can keep an id from being sampled, but it counts that id in the log-probs that it tells. So it
is given a model without such ids, whose numbers are translated here, and both are exact.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from poweropd.data.rollout import Request, Rollout
from poweropd.errors import RunError
from poweropd.rollouts.base import RolloutEngine, Sampling


class RenumberedEngine:
    """An engine whose id i is the student's id `kept[i]`.

    Requests may hold none but the kept ids, which is checked when a run starts.
    """

    def __init__(self, engine: RolloutEngine, kept: Sequence[int]) -> None:
        self.engine, self.kept, self.concurrent = engine, kept, engine.concurrent
        self.numbers = {id: number for number, id in enumerate(kept)}

    def sync(self) -> None:
        self.engine.sync()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Rollout]:
        """Yields the engine's rollouts in the student's ids, as answers to the given requests."""
        asked = {request.key: request for request in requests}
        stop_ids = tuple(self.numbers[i] for i in sampling.stop_ids)
        renumbered = [self._renumbered(request) for request in requests]
        for rollout in self.engine.generate(renumbered, replace(sampling, stop_ids=stop_ids)):
            ids, log_probs = rollout.completion_ids, rollout.sampling_log_probs
            if max(ids, default=0) >= len(self.kept):
                raise RunError(
                    f"rollout.engine: expected ids below {len(self.kept)}, which are those that "
                    f"student and teacher share, got {max(ids)}: start a server with "
                    f"""--hf-overrides '{{"vocab_size": {len(self.kept)}}}' --load-format dummy"""
                )
            request = asked[rollout.key]
            yield request.rollout([self.kept[i] for i in ids], log_probs, rollout.stopped)

    def _renumbered(self, request: Request) -> Request:
        ids = [self.numbers[i] for i in request.prompt.prompt_ids]
        return replace(request, prompt=replace(request.prompt, prompt_ids=ids))
