"""From examples to micro-batches: `Sequences`, `Batch`, and packing by a token budget.

A `Batch` is one micro-batch of examples, as the student and as the teacher read it, with its
trained tokens flattened to N. It is padded, with one line of the input for each sequence, or flat:
one line of all sequences, one after the other, without padding, in which position ids that start
again from 0 say where each sequence begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from poweropd.data.rollout import Example, TopIds

_NOT_PER_TOKEN = {"student", "teacher", "seeds", "keys"}  # fields of a batch


@dataclass(frozen=True)
class Sequences:
    """One model's view of a micro-batch: right-padded, or flat."""

    inputs: dict[str, Tensor]  # input_ids [B, T]; attention_mask, or position_ids if it is flat
    index: Tensor  # [N] into the flattened B * T: where each trained token is predicted
    targets: Tensor  # [N]

    @classmethod
    def collate(
        cls, sequences: Sequence[list[int]], indices: Sequence[Tensor], targets: Tensor, flat: bool
    ) -> "Sequences":
        """Collates the ids of each sequence, and where in it its trained tokens are predicted."""
        lengths = torch.tensor([len(ids) for ids in sequences])
        ids = [torch.tensor(own, dtype=torch.long) for own in sequences]
        if flat:
            positions = torch.cat([torch.arange(len(own)) for own in sequences])
            inputs = {"input_ids": torch.cat(ids)[None], "position_ids": positions[None]}
            starts = (lengths.cumsum(0) - lengths).tolist()
        else:
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            width = padded.shape[1]
            mask = (torch.arange(width) < lengths[:, None]).long()
            inputs = {"input_ids": padded, "attention_mask": mask}
            starts = [number * width for number in range(len(sequences))]
        index = [start + own for start, own in zip(starts, indices, strict=True)]
        return cls(inputs, torch.cat(index), targets)

    @property
    def input_ids(self) -> Tensor:
        """Returns the ids, [B, T] int64."""
        return self.inputs["input_ids"]

    def to(self, device: torch.device | str) -> Self:
        """Copies all tensors to a device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return type(self)(inputs, self.index.to(device), self.targets.to(device))

    def select(self, tokens: Tensor) -> Self:
        """Returns the same sequences with only the trained tokens of these indices, [k]."""
        return replace(self, index=self.index[tokens], targets=self.targets[tokens])


@dataclass(frozen=True)
class Batch:
    """A micro-batch with N trained tokens of B completions."""

    student: Sequences
    teacher: Sequences
    teacher_log_probs: Tensor | None  # [N] float32
    positions: Tensor  # [N] position in the completion
    completion_index: Tensor  # [N] which of the B completions the token belongs to
    task_reward: Tensor  # [N] float32, weighted; added to the token rewards
    loss_weights: Tensor  # [N] float32, factors of the tokens' loss
    seeds: Tensor  # [B] of the completions
    keys: Tensor  # [B, 2] prompt_index and sample_index of each completion
    teacher_entropy: Tensor  # [N] float32, NaN where it is not known
    teacher_top1: Tensor  # [N] float32, NaN where it is not known
    off_policy: Tensor  # [N] bool, whether the token's completion comes from a file
    reference_log_probs: Tensor | None = None  # [N] float32, if the reward has a reference model
    sampling_log_probs: Tensor | None = None  # [N] float32, see `Example.sampling_log_probs`
    teacher_hidden: Tensor | None = None  # [N, H], if the objective needs it
    spans: Tensor | None = None  # [N] number of each token's span; None if each token is one
    teacher_top: TopIds | None = None  # of N tokens, if the objective needs it

    def to(self, device: torch.device | str) -> "Batch":
        """Copies all tensors to a device."""
        values: dict[str, Any] = vars(self)
        return replace(self, **{k: v.to(device) for k, v in values.items() if v is not None})

    def by_completion(self, values: Tensor) -> tuple[Tensor, ...]:
        """Returns the parts of [N] values that belong to each of the B completions."""
        counts = self.completion_index.bincount(minlength=len(self.seeds))
        return values.split(counts.tolist())

    def select(self, tokens: Tensor) -> "Batch":
        """Returns the same sequences with only the trained tokens of these indices, [k]."""
        values: dict[str, Any] = {k: v for k, v in vars(self).items() if v is not None}
        kept = {name: values[name][tokens] for name in values.keys() - _NOT_PER_TOKEN}
        student, teacher = self.student.select(tokens), self.teacher.select(tokens)
        return replace(self, student=student, teacher=teacher, **kept)


def collate(examples: Sequence[Example], flat: bool = False, teacher_flat: bool = False) -> Batch:
    """Collates one micro-batch; `flat` and `teacher_flat` say how each model takes it.

    Without examples it has a single untrained token and N = 0: such a batch lets a process take
    part in a collective backward with nothing to train on.
    """
    if not examples:
        return _empty_batch()
    counts = torch.tensor([e.num_tokens for e in examples])
    return Batch(
        student=student_sequences(examples, flat),
        teacher=teacher_sequences(examples, teacher_flat),
        teacher_log_probs=_concatenated([e.teacher_log_probs for e in examples]),
        positions=torch.cat([e.positions for e in examples]),
        completion_index=torch.arange(len(examples)).repeat_interleave(counts),
        task_reward=torch.tensor([e.task_reward for e in examples]).repeat_interleave(counts),
        loss_weights=torch.tensor([e.loss_weight for e in examples]).repeat_interleave(counts),
        seeds=torch.tensor([e.seed for e in examples]),
        keys=torch.tensor([e.rollout.key for e in examples]),
        teacher_entropy=_or_nan([e.teacher_entropy for e in examples], counts),
        teacher_top1=_or_nan([e.teacher_top1 for e in examples], counts),
        off_policy=torch.tensor([e.rollout.off_policy for e in examples]).repeat_interleave(counts),
        reference_log_probs=_concatenated([e.reference_log_probs for e in examples]),
        sampling_log_probs=_concatenated([e.sampling_log_probs for e in examples]),
        spans=_numbered_spans(examples),
        teacher_top=_top_ids([e.teacher_top for e in examples]),
    )


def _numbered_spans(examples: Sequence[Example]) -> Tensor | None:
    """Returns the number of each token's span in the batch, [N]; None without an example in spans.

    Tokens of an example without spans are a span each.
    """
    if all(e.spans is None for e in examples):
        return None
    own = [torch.arange(e.num_tokens) if e.spans is None else e.spans for e in examples]
    firsts = accumulate((int(numbers[-1]) + 1 for numbers in own[:-1]), initial=0)
    return torch.cat([first + numbers for first, numbers in zip(firsts, own, strict=True)])


def _top_ids(parts: Sequence[TopIds | None]) -> TopIds | None:
    """Concatenates the parts; returns None if one of them is missing."""
    ids = _concatenated([None if part is None else part.ids for part in parts])
    log_probs = _concatenated([None if part is None else part.log_probs for part in parts])
    return None if ids is None or log_probs is None else TopIds(ids, log_probs)


def _concatenated(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenates the parts; returns None if one of them is missing."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _or_nan(parts: Sequence[Tensor | None], counts: Tensor) -> Tensor:
    """Concatenates each example's [n] values to [N] float32, with NaN for one that has none."""
    pairs = zip(parts, counts.tolist(), strict=True)
    return torch.cat([torch.full((n,), torch.nan) if p is None else p.float() for p, n in pairs])


def student_sequences(examples: Sequence[Example], flat: bool = False) -> Sequences:
    """Collates what the student reads of each example, with its targets."""
    parts = [(e.prompt.prompt_ids, e, e.student_length) for e in examples]
    return _sequences(parts, torch.cat([e.student_targets for e in examples]), flat)


def teacher_sequences(examples: Sequence[Example], flat: bool = False) -> Sequences:
    """Collates what the teacher reads of each example, with its targets."""
    parts = [(e.prompt.teacher_prompt_ids, e, e.teacher_length) for e in examples]
    return _sequences(parts, torch.cat([e.teacher_targets for e in examples]), flat)


def _sequences(
    parts: Sequence[tuple[list[int], Example, int]], targets: Tensor, flat: bool
) -> Sequences:
    ids = [(prompt + e.rollout.completion_ids)[:length] for prompt, e, length in parts]
    # The hidden state before a token predicts it.
    indices = [len(prompt) - 1 + e.positions for prompt, e, _ in parts]
    return Sequences.collate(ids, indices, targets, flat)


def _empty_batch() -> Batch:
    none, zeros = torch.empty(0, dtype=torch.long), torch.empty(0)
    sequences = Sequences.collate([[0]], [none], none, flat=False)
    return Batch(
        student=sequences,
        teacher=sequences,
        teacher_log_probs=zeros,
        positions=none,
        completion_index=none,
        task_reward=zeros,
        loss_weights=zeros,
        seeds=none,
        keys=none.view(0, 2),
        teacher_entropy=zeros,
        teacher_top1=zeros,
        off_policy=none.bool(),
        reference_log_probs=zeros,
        sampling_log_probs=zeros,
        teacher_top=TopIds(none.view(0, 1), zeros.view(0, 1)),
    )


def pack(lengths: Sequence[int], max_tokens: int, flat: bool = False) -> list[list[int]]:
    """Groups indices so that each group, padded to its longest or flat, fits in `max_tokens`.

    The longest come first: neighbours in length waste the least padding, short ones fill up flat
    groups, and a batch that does not fit in memory fails at once. A sequence longer than the
    budget makes a group of its own.
    """
    groups: list[list[int]] = []
    totals: list[int] = []  # tokens of each group, without padding
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if flat:
            fitting = (k for k, total in enumerate(totals) if total + lengths[i] <= max_tokens)
        else:
            last = len(groups) - 1
            fits = groups and (len(groups[last]) + 1) * lengths[groups[last][0]] <= max_tokens
            fitting = (k for k in [last] if fits)
        k = next(fitting, len(groups))
        if k == len(groups):
            groups.append([])
            totals.append(0)
        groups[k].append(i)
        totals[k] += lengths[i]
    return groups


def halved(max_tokens: int, lengths: Sequence[int]) -> int | None:
    """Returns a smaller token budget after running out of memory; None if there is none."""
    longest = max(lengths, default=1)
    return max(max_tokens // 2, longest) if max_tokens > longest else None
