"""A completion on its way through a step: requested, sampled, and made an example to train on.

A `Request` asks for one completion of a `Prompt`. A `Rollout` is what an engine yields for it. An
`Example` adds what is trained: the positions in the loss, and each model's targets there.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poweropd import stops
from poweropd.data.prompts import Prompt


@dataclass(frozen=True)
class Request:
    """One completion to sample. `seed` alone decides its randomness.

    `prompt_index` is the prompt's number within the step, not its row in the data: a row that comes
    twice in a step gets two different completions.
    """

    prompt: Prompt
    prompt_index: int
    sample_index: int
    seed: int
    max_new_tokens: int | None = None  # of this completion, if fewer than of all that are sampled

    @property
    def key(self) -> tuple[int, int]:
        """Identifies the completion within its step."""
        return self.prompt_index, self.sample_index

    @property
    def prompt_ids(self) -> list[int]:
        """Returns the ids that the student reads before the completion."""
        return self.prompt.prompt_ids

    @property
    def teacher_prompt_ids(self) -> list[int]:
        """Returns the ids that the teacher reads before the completion."""
        return self.prompt.teacher_prompt_ids

    def rollout(self, ids: list[int], log_probs: list[float], stopped: bool) -> "Rollout":
        """Makes the rollout that answers this request."""
        return Rollout(self, ids, log_probs, stopped)


@dataclass(frozen=True)
class TurnCounts:
    """What happened in the turns of a completion, where tools or an environment took part."""

    turns: int  # of the student
    tool_calls: int = 0
    tool_errors: int = 0  # calls that were answered with an error
    reward: float | None = None  # the environment's, if it gives one


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt.

    `sampling_log_probs` are the sampler's own, at temperature 1 and without truncation; the list is
    empty if the engine does not know them. In `completion_mask`, False marks a token that somebody
    else wrote (a tool, say), which is never trained.
    """

    request: Request
    completion_ids: list[int]
    sampling_log_probs: list[float]
    stopped: bool  # whether it ended by itself, with a stop token, which is then the last id
    completion_mask: list[bool] | None = None
    off_policy: bool = False  # whether it comes from a file, and no engine sampled it
    turns: TurnCounts | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Identifies the completion within its step."""
        return self.request.key

    @property
    def prompt_ids(self) -> list[int]:
        """Returns the ids that the student read before the completion."""
        return self.request.prompt_ids

    @property
    def own_ids(self) -> list[int]:
        """Returns the ids that the student wrote, without those of tools and environments."""
        mask = self.completion_mask or [True] * len(self.completion_ids)
        return [i for i, own in zip(self.completion_ids, mask, strict=True) if own]


@dataclass(frozen=True)
class TopIds:
    """A teacher's k most probable ids in the context of each of n tokens, the first ones first."""

    ids: Tensor  # [n, k] int64
    log_probs: Tensor  # [n, k] float32

    def __getitem__(self, tokens: Tensor) -> "TopIds":
        """Returns those of some tokens, by their indices [m]."""
        return TopIds(self.ids[tokens], self.log_probs[tokens])

    def to(self, device: torch.device | str) -> "TopIds":
        """Copies both tensors to a device."""
        return TopIds(self.ids.to(device), self.log_probs.to(device))


@dataclass(frozen=True)
class Example:
    """A completion with its n trained tokens; its other tokens are context only."""

    rollout: Rollout
    positions: Tensor  # [n] positions in the completion, increasing
    student_targets: Tensor  # [n]
    teacher_targets: Tensor  # [n]
    teacher_log_probs: Tensor | None = None  # [n] float32, once scored; of the spans, if any
    teacher_entropy: Tensor | None = None  # [n] float32, nats, if the teacher says it
    teacher_top1: Tensor | None = None  # [n]: 1 if no token is more probable to the teacher
    spans: Tensor | None = None  # [n] number of each token's span, see `teachers.spans`
    teacher_top: TopIds | None = None  # of n tokens, if they were asked for
    reference_log_probs: Tensor | None = None  # [n] float32, of a reward's reference model
    task_reward: float = 0.0  # weighted; added to the reward of each of its tokens
    loss_weight: float = 1.0  # factor of its tokens' loss: the weight of its teacher

    @property
    def prompt(self) -> Prompt:
        """Returns the prompt that was completed."""
        return self.rollout.request.prompt

    @property
    def num_tokens(self) -> int:
        """Counts the trained tokens."""
        return len(self.positions)

    @property
    def student_length(self) -> int:
        """Counts the tokens that the student must read: all before the last trained one."""
        return len(self.prompt.prompt_ids) + int(self.positions[-1])

    @property
    def teacher_length(self) -> int:
        """Counts the tokens that the teacher must read: all before the last trained one."""
        return len(self.prompt.teacher_prompt_ids) + int(self.positions[-1])

    @property
    def sampling_log_probs(self) -> Tensor | None:
        """Returns the sampler's log-probs of the trained tokens, [n] float32.

        They are NaN where the student is scored on another token than the sampled one, and for a
        completion of a file without any; None stands for an engine that gave none.
        """
        if not self.rollout.sampling_log_probs:
            unknown = torch.full((self.num_tokens,), torch.nan)
            return unknown if self.rollout.off_policy else None
        log_probs = torch.tensor(self.rollout.sampling_log_probs)[self.positions]
        sampled = torch.tensor(self.rollout.completion_ids)[self.positions]
        return log_probs.where(sampled == self.student_targets, torch.nan)

    @property
    def seed(self) -> int:
        """Derives 63 bits for whatever is random about this completion.

        They are the same in any batch, on any process, and after a resume.
        """
        key = f"{self.rollout.key} {self.prompt.prompt_ids} {self.rollout.completion_ids}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1

    def kept(self, tokens: Tensor, spans: Tensor) -> "Example":
        """Returns the example with only the trained tokens of a mask [n], which are in spans."""
        positions, student = self.positions[tokens], self.student_targets[tokens]
        teacher = self.teacher_targets[tokens]
        return replace(
            self,
            positions=positions,
            student_targets=student,
            teacher_targets=teacher,
            spans=spans,
        )

    def scored(
        self,
        teacher_log_probs: Tensor,
        teacher_entropy: Tensor | None = None,
        teacher_top1: Tensor | None = None,
        teacher_top: TopIds | None = None,
    ) -> "Example":
        """Returns the example with the teacher's scores."""
        return replace(
            self,
            teacher_log_probs=teacher_log_probs,
            teacher_entropy=teacher_entropy,
            teacher_top1=teacher_top1,
            teacher_top=teacher_top,
        )


def span_totals(values: Tensor, spans: Tensor) -> Tensor:
    """Returns for each value the sum of all values of its span, [N]; `spans` are increasing."""
    _, owner, sizes = spans.unique_consecutive(return_inverse=True, return_counts=True)
    return torch.segment_reduce(values, "sum", lengths=sizes)[owner]


def make_example(
    rollout: Rollout,
    student_stop_ids: Sequence[int],
    teacher_stop_ids: Sequence[int],
    policy: str,
) -> Example | None:
    """Makes an example of a completion by a stop policy; None if nothing of it is trained."""
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
    """Makes the examples of a step in a fixed order, without completions that train nothing."""
    made = (
        make_example(rollout, student_stop_ids, teacher_stop_ids, policy)
        for rollout in sorted(rollouts, key=lambda r: r.key)
    )
    return [example for example in made if example is not None]
