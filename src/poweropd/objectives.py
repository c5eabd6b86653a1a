"""Objectives: what the student's head computes on the N hidden states of a micro-batch.

An objective is called inside the student's forward with hidden states, head and batch. It closes
over the reward and the weight of one token (1 / N, times the number of processes), builds the
coefficient for the kernel, and records per token what the run reports. `docs/objectives.md` has
the mathematics.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from poweropd.batching import Batch
from poweropd.errors import UsageError
from poweropd.kernels import (
    Head,
    Support,
    TokenStatistics,
    ValueBaseline,
    linear_full_vocab,
    linear_log_prob,
    linear_policy_gradient,
)
from poweropd.rewards import Reward
from poweropd.selection import Selection

# Above this an importance weight is cut off.
MAX_IMPORTANCE_WEIGHT = 2.0


@dataclass(frozen=True)
class TokenRecord:
    """What is known of each trained token, [N] float32 each, without a gradient."""

    positions: Tensor  # in the completion
    rewards: Tensor  # r(t, p) alone: no bonus, no baseline
    student_log_probs: Tensor
    teacher_log_probs: Tensor
    entropy: Tensor  # of the student, nats
    sampler_log_ratios: Tensor  # ln p_student - ln p_sampler, full softmax, temperature 1; or NaN
    weights: Tensor  # importance weights; 1 without the correction
    top1: Tensor  # 1 where no token is more probable to the student, else 0
    teacher_entropy: Tensor  # NaN where the teacher gave log-probs alone
    teacher_top1: Tensor  # as `top1`; NaN where it is not known
    prompt_indices: Tensor  # with the next: which completion of the step
    sample_indices: Tensor

    @classmethod
    def cat(cls, records: Sequence["TokenRecord"]) -> "TokenRecord":
        """One record, on the CPU."""
        columns = zip(*(vars(r).values() for r in records), strict=True)
        return cls(*(torch.cat([part.cpu() for part in column]) for column in columns))


class Objective(Protocol):
    """(hidden_states [N, H], head, batch) -> loss of the micro-batch and its token record."""

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch
    ) -> tuple[Tensor, TokenRecord]: ...


@dataclass(frozen=True)
class Sampled:
    """-sum over trained tokens of token_weight * sg[w (r(t, p) + bonus - V)] * ln p.

    That is arXiv:2606.17199 where the importance weights w are 1, the bonus and the baseline's
    values V are 0. The teacher's log-probs come with the batch, or, with a `teacher_head`, from
    its hidden states; `baseline`, `merged_ids` and `support` need the latter.
    """

    reward: Reward
    token_weight: float
    teacher_head: Head | None = None
    baseline: bool = False
    correction: bool = False
    merged_ids: Tensor | None = None
    support: Support | None = None

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch
    ) -> tuple[Tensor, TokenRecord]:
        teacher = self._teacher(batch)
        if teacher is None:
            assert batch.teacher_log_probs is not None, "the examples have not been scored"
            teacher_log_probs = batch.teacher_log_probs
            values = torch.zeros_like(teacher_log_probs)
        else:
            teacher_log_probs, values = teacher.teacher_log_probs, teacher.values
        statistics = TokenStatistics.empty(len(values), values.device)
        rewards, weights = torch.empty_like(values), torch.ones_like(values)

        def coefficient(student_log_probs: Tensor, tokens: slice) -> Tensor:
            rewards[tokens] = self.reward(teacher_log_probs[tokens], student_log_probs)
            if self.correction:
                weights[tokens] = self._weights(batch, statistics, tokens)
            advantages = rewards[tokens] + batch.bonus[tokens] - values[tokens]
            return self.token_weight * weights[tokens] * advantages

        loss = linear_policy_gradient(
            hidden_states,
            head.weight,
            batch.student.targets,
            coefficient,
            merged_ids=self.merged_ids,
            statistics=statistics,
            baseline=teacher,
            **head.options,
        )
        statistics.teacher_log_probs.copy_(teacher_log_probs)
        return loss, _record(batch, rewards, statistics, self.merged_ids, weights)

    def _teacher(self, batch: Batch) -> ValueBaseline | None:
        if self.teacher_head is None:
            return None
        assert batch.teacher_hidden is not None, "the teacher has not read this batch"
        return ValueBaseline(
            batch.teacher_hidden,
            self.teacher_head,
            self.reward if self.baseline else None,
            batch.teacher.targets,
            self.support,
        )

    def _weights(self, batch: Batch, statistics: TokenStatistics, tokens: slice) -> Tensor:
        """min(p_student / p_sampler, MAX_IMPORTANCE_WEIGHT); 1 where that is not known."""
        if batch.sampling_log_probs is None:
            raise UsageError(
                "rollout.correction: truncated needs the sampler's log-probs, and the engine gave "
                "none with its completions: set rollout.correction=none"
            )
        ratios = _sampler_log_ratios(batch, statistics, self.merged_ids)[tokens]
        return ratios.exp().clamp(max=MAX_IMPORTANCE_WEIGHT).nan_to_num(nan=1.0)


@dataclass(frozen=True)
class FullVocab:
    """The exact expectation of `Sampled` over the student's next token, for any pointwise reward.

    Its value is the reward's divergence; for the log ratio that is the reverse KL. A bonus says
    something of the sampled token alone, so it is the sampled loss, -sum bonus * ln p, beside it.
    """

    reward: Reward
    token_weight: float
    teacher_head: Head
    top_k: int | None = None
    merged_ids: Tensor | None = None
    support: Support | None = None

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch
    ) -> tuple[Tensor, TokenRecord]:
        assert batch.teacher_hidden is not None, "the teacher has not read this batch"
        statistics = TokenStatistics.empty(len(batch.positions), hidden_states.device)
        loss = linear_full_vocab(
            hidden_states,
            head.weight,
            batch.teacher_hidden,
            self.teacher_head.weight,
            self.reward,
            self.token_weight,
            value=self.reward.divergence,
            top_k=self.top_k,
            teacher_options=self.teacher_head.options,
            merged_ids=self.merged_ids,
            support=self.support,
            targets=batch.student.targets,
            teacher_targets=batch.teacher.targets,
            statistics=statistics,
            **head.options,
        )
        if batch.bonus.any():
            loss = loss + self._bonus_loss(hidden_states, head, batch)
        rewards = self.reward(statistics.teacher_log_probs, statistics.student_log_probs)
        return loss, _record(batch, rewards, statistics, self.merged_ids)

    def _bonus_loss(self, hidden_states: Tensor, head: Head, batch: Batch) -> Tensor:
        teacher = None
        if self.support is not None:  # the student's log-probs are those over the support
            assert batch.teacher_hidden is not None
            teacher = ValueBaseline(batch.teacher_hidden, self.teacher_head, support=self.support)
        return linear_policy_gradient(
            hidden_states,
            head.weight,
            batch.student.targets,
            lambda _, tokens: self.token_weight * batch.bonus[tokens],
            merged_ids=self.merged_ids,
            baseline=teacher,
            **head.options,
        )


@dataclass(frozen=True)
class Selected:
    """`objective` on the tokens that a selection keeps of each completion.

    Scores are log-probs under the full softmax, for one more head matmul over all tokens; the
    objective's own matmuls are over the kept tokens only.
    """

    objective: Objective
    selection: Selection
    teacher_head: Head | None = None
    merged_ids: Tensor | None = None

    def __call__(
        self, hidden_states: Tensor, head: Head, batch: Batch
    ) -> tuple[Tensor, TokenRecord]:
        def log_probs() -> tuple[Tensor, Tensor]:
            student = self._log_probs(hidden_states, head, batch.student.targets)
            if batch.teacher_log_probs is not None:
                return batch.teacher_log_probs, student
            assert batch.teacher_hidden is not None, "the examples have not been scored"
            assert self.teacher_head is not None
            targets = batch.teacher.targets
            return self._log_probs(batch.teacher_hidden, self.teacher_head, targets), student

        tokens = self.selection.choose(batch, log_probs)
        return self.objective(hidden_states.index_select(0, tokens), head, batch.of(tokens))

    def _log_probs(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        return linear_log_prob(
            hidden, head.weight, targets, merged_ids=self.merged_ids, **head.options
        )


def _sampler_log_ratios(
    batch: Batch, statistics: TokenStatistics, merged_ids: Tensor | None
) -> Tensor:
    """[N] ln p_student - ln p_sampler of the sampled token, NaN where one of them is not known.

    The student's is undone of a support. Of merged ids it has the sum, the sampler a single one.
    """
    if batch.sampling_log_probs is None:
        return torch.full_like(statistics.student_log_probs, torch.nan)
    own = statistics.student_log_probs + statistics.log_support
    ratios = own - batch.sampling_log_probs
    if merged_ids is None:
        return ratios
    return ratios.masked_fill(torch.isin(batch.student.targets, merged_ids), torch.nan)


def _record(
    batch: Batch,
    rewards: Tensor,
    statistics: TokenStatistics,
    merged_ids: Tensor | None,
    weights: Tensor | None = None,
) -> TokenRecord:
    return TokenRecord(
        positions=batch.positions,
        rewards=rewards,
        student_log_probs=statistics.student_log_probs,
        teacher_log_probs=statistics.teacher_log_probs,
        entropy=statistics.entropy,
        sampler_log_ratios=_sampler_log_ratios(batch, statistics, merged_ids),
        weights=torch.ones_like(rewards) if weights is None else weights,
        top1=statistics.top1.float(),
        teacher_entropy=batch.teacher_entropy,
        teacher_top1=batch.teacher_top1,
        prompt_indices=batch.places[batch.rows, 0],
        sample_indices=batch.places[batch.rows, 1],
    )


MakeObjective = Callable[[Reward, float], Objective]


@dataclass(frozen=True)
class Maker:
    """Makes a step's objective from its reward and token weight, and counts what it trains on."""

    make: MakeObjective
    selection: Selection | None = None
    teacher_head: Head | None = None
    merged_ids: Tensor | None = None

    def __call__(self, reward: Reward, token_weight: float) -> Objective:
        objective = self.make(reward, token_weight)
        if self.selection is None:
            return objective
        return Selected(objective, self.selection, self.teacher_head, self.merged_ids)

    def num_tokens(self, lengths: Iterable[int]) -> int:
        """Tokens that are trained on of completions with so many in their loss masks."""
        every = torch.tensor(list(lengths), dtype=torch.long)
        return int((every if self.selection is None else self.selection.counts(every)).sum())


SAMPLED = Maker(Sampled)


def maker(
    kind: str,
    teacher_head: Head | None = None,
    *,
    baseline: bool = False,
    correction: bool = False,
    top_k: int | None = None,
    merged_ids: Tensor | None = None,
    support: Support | None = None,
    selection: Selection | None = None,
) -> Maker:
    """How to make the objective `kind`; `teacher_head` where the teacher reads along."""
    shared: dict[str, Any] = {
        "teacher_head": teacher_head,
        "merged_ids": merged_ids,
        "support": support,
    }
    kinds: dict[str, MakeObjective] = {
        "sampled": partial(Sampled, baseline=baseline, correction=correction, **shared),
        "full_vocab": partial(FullVocab, top_k=top_k, **shared),
    }
    return Maker(kinds[kind], selection, teacher_head, merged_ids)
