"""The value baseline: what a token's reward is expected to be, exactly, from both heads."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from poweropd.kernels.head import Head
from poweropd.kernels.softmax import (
    Actions,
    check_tokens,
    expectation,
    log_softmax_,
    merge_,
    spare_tile,
    tiles,
)
from poweropd.kernels.support import Support, restrict_

# (teacher log-probs, student log-probs), both [n, V] or [n, k] -> float32 of that shape.
RewardFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ValueBaseline:
    """V(c) = sum_v p_v r(t_v, p_v) of every token's context c, exact, for sampled distillation.

    A reward less V(c) has the same expected gradient under exact sampling, and less variance.
    Give it to `linear_policy_gradient(..., baseline=baseline)`: before the coefficient of a
    chunk is asked for, `values` and `teacher_log_probs` hold that chunk's tokens::

        def coefficient(student_log_probs, tokens):
            r = reward(baseline.teacher_log_probs[tokens], student_log_probs)
            return (r - baseline.values[tokens]) / num_tokens

    `hidden` [N, H_teacher] and `head` are the teacher's, over the student's vocabulary;
    `targets` [N] the teacher's own targets where they differ from the student's. Without a
    `reward` the values stay 0, and only the teacher's log-probs are filled. With a `support` both
    distributions are those over it, the student's log-probs of the kernel's result included.
    """

    hidden: Tensor
    head: Head
    reward: RewardFunction | None = None
    targets: Tensor | None = None
    support: Support | None = None
    values: Tensor = field(init=False)  # [N] float32, filled by the kernel
    teacher_log_probs: Tensor = field(init=False)  # [N] float32, filled by the kernel

    def __post_init__(self) -> None:
        empty = torch.full((self.hidden.shape[0],), torch.nan, device=self.hidden.device)
        object.__setattr__(self, "teacher_log_probs", empty)
        values = torch.zeros_like(empty) if self.reward is None else empty.clone()
        object.__setattr__(self, "values", values)

    def fill(
        self,
        tokens: slice,
        student_log_probs: Tensor,
        targets: Tensor,
        head: Head,
        buffer: Tensor,
        merged_ids: Tensor | None,
        outside: Tensor | None,
    ) -> None:
        """Of a chunk: student's log-probs [n, V], targets [n]; prepared head; a [n, V] buffer;
        [n, V] ids outside the support."""
        teacher_log_probs = head.logits(self.hidden[tokens], buffer)
        log_softmax_(teacher_log_probs)
        if outside is not None:
            restrict_(teacher_log_probs, outside)
        own = targets if self.targets is None else self.targets[tokens]
        actions = Actions.of(teacher_log_probs, own, merged_ids)
        self.teacher_log_probs[tokens] = actions.log_weights.float()
        if self.reward is None:
            return
        if merged_ids is None:
            values = _expected(self.reward, teacher_log_probs, student_log_probs)
            self.values[tokens] = values.float()
            return
        apart = student_log_probs[:, merged_ids]
        merge_(student_log_probs, merged_ids)
        merge_(teacher_log_probs, merged_ids)
        values = _expected(self.reward, teacher_log_probs, student_log_probs)
        self.values[tokens] = values.float()
        student_log_probs[:, merged_ids] = apart


def _expected(
    reward: RewardFunction, teacher_log_probs: Tensor, student_log_probs: Tensor
) -> Tensor:
    expected = student_log_probs.new_empty(student_log_probs.shape[0])
    spare = spare_tile(student_log_probs)
    for rows in tiles(student_log_probs):
        p = student_log_probs[rows]
        r = rewards_of(reward, teacher_log_probs[rows], p)
        expected[rows], _ = expectation(p.exp(), r, spare[: rows.stop - rows.start])
    return expected


def rewards_of(
    reward: RewardFunction, teacher_log_probs: Tensor, student_log_probs: Tensor
) -> Tensor:
    rewards = reward(teacher_log_probs, student_log_probs)
    if rewards.shape != student_log_probs.shape:
        raise ValueError(
            f"reward: expected {list(student_log_probs.shape)}, got {list(rewards.shape)}"
        )
    return rewards.to(student_log_probs.dtype)


def check_teacher(
    hidden: Tensor, head: Head, targets: Tensor | None, num_tokens: int, vocab_size: int
) -> None:
    """ValueError unless a teacher's hidden states, head and targets fit the student's."""
    head.check(hidden, "teacher ")
    if hidden.shape[0] != num_tokens:
        raise ValueError(f"teacher hidden: expected {num_tokens} rows, got {hidden.shape[0]}")
    if head.vocab_size != vocab_size:
        raise ValueError(
            f"teacher weight: expected the student's {vocab_size} rows, got {head.vocab_size}; "
            "slice both to the vocabulary they share"
        )
    if targets is not None:
        check_tokens("teacher targets", targets, num_tokens, torch.int64)
