"""What each optimizer step asks for: prompts, requests, how they are sampled, what a file gives.

All of it is a function of the step, so that a resumed run and any number of processes agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from poweropd.config import Config
from poweropd.data.off_policy import OffPolicy
from poweropd.data.prompts import Prompt, PromptOrder
from poweropd.data.rollout import Request, Rollout
from poweropd.rollouts.base import Sampling, completion_seed


@dataclass(frozen=True)
class StepRequests:
    """The requests of a run's steps, which are counted from 0.

    `own` is this process's share of those of a step.
    """

    config: Config
    trained: Sequence[Prompt]
    order: PromptOrder
    off_policy: OffPolicy | None
    own: slice

    def prompts(self, step: int) -> list[Prompt]:
        """Returns the prompts of a step, over all processes."""
        rows = self.order.at_step(step, self.config.train.prompts_per_step)
        return [self.trained[row] for row in rows]

    def of_all(self, step: int) -> list[Request]:
        """Makes the requests of a step, over all processes."""
        return [
            Request(
                prompt=prompt,
                prompt_index=number,
                sample_index=sample,
                seed=completion_seed(self.config.train.seed, step, number, sample),
            )
            for number, prompt in enumerate(self.prompts(step))
            for sample in range(self.config.rollout.per_prompt)
        ]

    def requests(self, step: int) -> list[Request]:
        """Makes this process's share of the requests of a step."""
        return self.of_all(step)[self.own]

    def given(self, step: int) -> dict[tuple[int, int], Rollout]:
        """Returns this process's completions of a step that come from a file, by their keys."""
        if self.off_policy is None:
            return {}
        tokens, every = self.config.rollout.max_new_tokens_at(step), self.of_all(step)
        found = self.off_policy.rollouts(step, every, tokens)
        own = {request.key for request in every[self.own]}
        return {rollout.key: rollout for rollout in found if rollout.key in own}

    def sampled(self, step: int) -> list[Request]:
        """Makes this process's requests of a step that an engine answers."""
        given = self.given(step)
        return [request for request in self.requests(step) if request.key not in given]

    def sampling(self, step: int, first: Sampling) -> Sampling:
        """Returns how a step is sampled, if `first` is how the first one is."""
        rollout = self.config.rollout
        return replace(
            first,
            max_new_tokens=rollout.max_new_tokens_at(step),
            temperature=rollout.temperature_at(step),
        )
