"""From completions to micro-batches: `Rollout`, `Example`, `Batch`, packing by token budget.

A `Rollout` is what an engine yields. An `Example` adds what is trained: the positions in the
loss and each model's targets there. A `Batch` is one micro-batch of examples, seen by the
student and by the teacher, with the trained tokens flattened to N.

A micro-batch is padded, one row to a sequence, or flat: one row of all sequences, one after the
other, without padding, in which position ids that start again from 0 say where each begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poweropd.data.rollout import Example


@dataclass(frozen=True)
class Sequences:
    """One model's view of a micro-batch: right-padded, or flat."""

    inputs: dict[str, Tensor]  # input_ids [B, T]; attention_mask, or position_ids of a flat row
    index: Tensor  # [N] into the flattened B * T: where each trained token is predicted
    targets: Tensor  # [N]

    @classmethod
    def of_rows(
        cls, rows: Sequence[list[int]], indices: Sequence[Tensor], targets: Tensor, flat: bool
    ) -> "Sequences":
        """From the ids of each sequence, and where in it its trained tokens are predicted."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        if flat:
            positions = torch.cat([torch.arange(len(row)) for row in rows])
            inputs = {"input_ids": torch.cat(ids)[None], "position_ids": positions[None]}
            starts = (lengths.cumsum(0) - lengths).tolist()
        else:
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            width = padded.shape[1]
            mask = (torch.arange(width) < lengths[:, None]).long()
            inputs = {"input_ids": padded, "attention_mask": mask}
            starts = [row * width for row in range(len(rows))]
        index = [start + own for start, own in zip(starts, indices, strict=True)]
        return cls(inputs, torch.cat(index), targets)

    @property
    def input_ids(self) -> Tensor:
        return self.inputs["input_ids"]

    def to(self, device: torch.device | str) -> "Sequences":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Sequences(inputs, self.index.to(device), self.targets.to(device))

    def of(self, tokens: Tensor) -> "Sequences":
        return replace(self, index=self.index[tokens], targets=self.targets[tokens])


@dataclass(frozen=True)
class Batch:
    """A micro-batch with N trained tokens."""

    student: Sequences
    teacher: Sequences
    teacher_log_probs: Tensor | None  # [N] float32
    positions: Tensor  # [N] position in the completion
    rows: Tensor  # [N] which of the micro-batch's completions
    bonus: Tensor  # [N] float32, added to the token rewards
    seeds: Tensor  # [B] of the completions
    places: Tensor  # [B, 2] prompt_index and sample_index of each of them
    teacher_entropy: Tensor  # [N] float32, NaN where it is not known
    teacher_top1: Tensor  # [N] float32, NaN where it is not known
    sampling_log_probs: Tensor | None = None  # [N] float32, see `Example.sampling_log_probs`
    teacher_hidden: Tensor | None = None  # [N, H], where the objective needs it

    def to(self, device: torch.device | str) -> "Batch":
        moved: list[Any] = [x if x is None else x.to(device) for x in vars(self).values()]
        return Batch(*moved)

    def of(self, tokens: Tensor) -> "Batch":
        """The same sequences, with only some of the N trained tokens, by their indices [k]."""
        per_token = vars(self).keys() - {"student", "teacher", "seeds", "places"}
        columns = {name: vars(self)[name] for name in per_token}
        kept: dict[str, Any] = {k: x if x is None else x[tokens] for k, x in columns.items()}
        return replace(
            self,
            student=self.student.of(tokens),
            teacher=self.teacher.of(tokens),
            **kept,
        )


def collate(examples: Sequence[Example], flat: bool = False, teacher_flat: bool = False) -> Batch:
    """One micro-batch; without examples, one with a single untrained token and N = 0.

    `flat` and `teacher_flat` say how each model takes it. The empty one lets a process take part in
    a collective backward with nothing to train on.
    """
    if not examples:
        return _empty_batch()
    counts = torch.tensor([e.num_tokens for e in examples])
    return Batch(
        student=student_sequences(examples, flat),
        teacher=teacher_sequences(examples, teacher_flat),
        teacher_log_probs=_cat([e.teacher_log_probs for e in examples]),
        positions=torch.cat([e.positions for e in examples]),
        rows=torch.arange(len(examples)).repeat_interleave(counts),
        bonus=torch.tensor([e.bonus for e in examples]).repeat_interleave(counts),
        seeds=torch.tensor([e.seed for e in examples]),
        places=torch.tensor([e.rollout.place for e in examples]),
        teacher_entropy=_known([e.teacher_entropy for e in examples], counts),
        teacher_top1=_known([e.teacher_top1 for e in examples], counts),
        sampling_log_probs=_cat([e.sampling_log_probs for e in examples]),
    )


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    """None where a part is missing."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _known(parts: Sequence[Tensor | None], counts: Tensor) -> Tensor:
    """[N] float32 of each example's [n] values, NaN where it has none."""
    pairs = zip(parts, counts.tolist(), strict=True)
    return torch.cat([torch.full((n,), torch.nan) if p is None else p.float() for p, n in pairs])


def student_sequences(examples: Sequence[Example], flat: bool = False) -> Sequences:
    rows = [(e.rollout.prompt_ids, e, e.student_length) for e in examples]
    return _sequences(rows, torch.cat([e.student_targets for e in examples]), flat)


def teacher_sequences(examples: Sequence[Example], flat: bool = False) -> Sequences:
    rows = [(e.rollout.teacher_prompt_ids, e, e.teacher_length) for e in examples]
    return _sequences(rows, torch.cat([e.teacher_targets for e in examples]), flat)


def _sequences(
    rows: Sequence[tuple[list[int], Example, int]], targets: Tensor, flat: bool
) -> Sequences:
    ids = [(prompt + e.rollout.completion_ids)[:length] for prompt, e, length in rows]
    # The hidden state before a token predicts it.
    indices = [len(prompt) - 1 + e.positions for prompt, e, _ in rows]
    return Sequences.of_rows(ids, indices, targets, flat)


def _empty_batch() -> Batch:
    none = torch.empty(0, dtype=torch.long)
    sequences = Sequences.of_rows([[0]], [none], none, flat=False)
    zeros, places = torch.empty(0), none.view(0, 2)
    return Batch(
        *(sequences, sequences, zeros, none, none, zeros, none),
        *(places, zeros, zeros, zeros),
    )


def pack(lengths: Sequence[int], max_tokens: int, flat: bool = False) -> list[list[int]]:
    """Groups indices so that each group, padded to its longest or flat, fits in `max_tokens`.

    Longest first: neighbours in length waste the least padding, short ones fill up flat rows, and a
    batch that does not fit in memory fails at once. A sequence longer than the budget makes a group
    of its own.
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
    """A token budget to go on with after running out of memory; None where none is left."""
    longest = max(lengths, default=1)
    return max(max_tokens // 2, longest) if max_tokens > longest else None
