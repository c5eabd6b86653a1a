"""A completion on its way: what is asked for, what was sampled, what is trained."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poweropd import stops


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt."""

    prompt_index: int
    sample_index: int
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int]
    # The sampler's own, at temperature 1, without truncation; none where the engine knows none.
    sampling_log_probs: list[float]
    stopped: bool  # ended with a stop token, which is then the last id
    completion_mask: list[bool] | None = None  # False: another's token (a tool's), never trained

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in its step, whatever the order in which completions end."""
        return self.prompt_index, self.sample_index


@dataclass(frozen=True)
class Example:
    """A completion with its n trained tokens; the others of its tokens are context only."""

    rollout: Rollout
    positions: Tensor  # [n] positions in the completion, increasing
    student_targets: Tensor  # [n]
    teacher_targets: Tensor  # [n]
    teacher_log_probs: Tensor | None = None  # [n] float32, once scored
    teacher_entropy: Tensor | None = None  # [n] float32, nats, where the teacher says it
    teacher_top1: Tensor | None = None  # [n] bool: no token is more probable to the teacher
    domain: str = ""  # which of several teachers scores it
    row: int | None = None  # of its prompt in the data
    bonus: float = 0.0  # added to the reward of each of its tokens (a weighted task reward)

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def student_length(self) -> int:
        """Tokens the student must read: up to the one that predicts the last trained token."""
        return len(self.rollout.prompt_ids) + int(self.positions[-1])

    @property
    def teacher_length(self) -> int:
        return len(self.rollout.teacher_prompt_ids) + int(self.positions[-1])

    @property
    def sampling_log_probs(self) -> Tensor | None:
        """[n] float32, the sampler's; NaN where the student is scored on another token, None
        where the engine gave none."""
        if not self.rollout.sampling_log_probs:
            return None
        log_probs = torch.tensor(self.rollout.sampling_log_probs)[self.positions]
        sampled = torch.tensor(self.rollout.completion_ids)[self.positions]
        return log_probs.where(sampled == self.student_targets, torch.nan)

    @property
    def seed(self) -> int:
        """63 bits for whatever is random about this completion: the same in any batch, on any
        process, and after a resume."""
        key = f"{self.rollout.place} {self.rollout.prompt_ids} {self.rollout.completion_ids}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1

    def scored(
        self,
        teacher_log_probs: Tensor,
        teacher_entropy: Tensor | None = None,
        teacher_top1: Tensor | None = None,
    ) -> "Example":
        return replace(
            self,
            teacher_log_probs=teacher_log_probs,
            teacher_entropy=teacher_entropy,
            teacher_top1=teacher_top1,
        )


def make_example(
    rollout: Rollout,
    student_stop_ids: Sequence[int],
    teacher_stop_ids: Sequence[int],
    policy: str,
) -> Example | None:
    """A completion as an example by a stop policy; None where there is nothing to train on."""
    ids = torch.tensor([rollout.completion_ids], dtype=torch.long)
    own = rollout.completion_mask
    targets = stops.targets(
        ids, torch.ones_like(ids, dtype=torch.bool), student_stop_ids, teacher_stop_ids, policy
    )
    trained = targets.loss_mask[0] if own is None else targets.loss_mask[0] & torch.tensor(own)
    positions = trained.nonzero().flatten()
    if not len(positions):
        return None
    student, teacher = targets.student_targets[0], targets.teacher_targets[0]
    return Example(rollout, positions, student[positions], teacher[positions])


def make_examples(
    rollouts: Iterable[Rollout],
    student_stop_ids: Sequence[int],
    teacher_stop_ids: Sequence[int],
    policy: str,
) -> list[Example]:
    """Examples of a step in a fixed order; completions with nothing to train on are left out."""
    made = (
        make_example(rollout, student_stop_ids, teacher_stop_ids, policy)
        for rollout in sorted(rollouts, key=lambda r: r.place)
    )
    return [example for example in made if example is not None]


@dataclass(frozen=True)
class Request:
    """One completion to sample. `seed` alone decides its randomness."""

    prompt_index: int
    sample_index: int
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    seed: int

    def rollout(self, ids: list[int], log_probs: list[float], stopped: bool) -> Rollout:
        """The completion of this request."""
        return Rollout(
            prompt_index=self.prompt_index,
            sample_index=self.sample_index,
            prompt_ids=self.prompt_ids,
            teacher_prompt_ids=self.teacher_prompt_ids,
            completion_ids=ids,
            sampling_log_probs=log_probs,
            stopped=stopped,
        )
