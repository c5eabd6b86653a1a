"""FLOPs of an update: as the paper counts them (Appendix B), and as they are really done.

Both count the matmuls, two operations to a multiply-add, and half of the attention matrix.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from poweropd.models.geometry import Geometry


def paper_forward(geometry: Geometry, batch: int, length: int) -> float:
    """Counts F_tr of arXiv:2606.17199, Appendix B: one forward of `batch` sequences, no head.

    It takes the queries to be as wide as the hidden states, which Qwen3's are not.
    """
    d, d_kv, m = geometry.hidden, geometry.key_value, geometry.mlp
    per_layer = 4 * length * d**2 + 4 * length * d * d_kv + 2 * length**2 * d + 6 * length * d * m
    return float(batch * geometry.layers * per_layer)


def linears(geometry: Geometry, length: int) -> float:
    """Counts the FLOPs of the linear maps in one forward of one sequence."""
    return float(geometry.layers * 2 * length * geometry.linear_parameters)


def attention(geometry: Geometry, length: int) -> float:
    """Counts the FLOPs of scores and weighted values in one forward of one sequence."""
    return float(geometry.layers * 2 * length**2 * geometry.query)


def head(geometry: Geometry, tokens: int) -> float:
    """Counts the FLOPs of the logits of so many tokens."""
    return float(2 * tokens * geometry.vocab * geometry.hidden)


@dataclass(frozen=True)
class Passes:
    """How often the student's matmuls run in an update, as multiples of one forward."""

    linears: int = 3
    attention: int = 3
    head: int = 3

    @classmethod
    def of(cls, lora: bool, needs_statistics: bool) -> "Passes":
        """Returns the passes of an update.

        Frozen weights take no gradient; a reward with statistics takes one more forward.
        """
        passes = cls(2, 3, 2) if lora else cls()
        if not needs_statistics:
            return passes
        return cls(passes.linears + 1, passes.attention + 1, passes.head + 1)

    def recomputing(self) -> "Passes":
        """Returns the passes with checkpointing, in which the body runs forward once more."""
        return replace(self, linears=self.linears + 1, attention=self.attention + 1)


@dataclass(frozen=True)
class UpdateFlops:
    """FLOPs of scoring and update, by model and part."""

    teacher_body: float
    teacher_head: float
    student_body: float
    student_head: float

    @property
    def bodies(self) -> float:
        """Sums the FLOPs of both models without their heads."""
        return self.teacher_body + self.student_body

    @property
    def heads(self) -> float:
        """Sums the FLOPs of both heads."""
        return self.teacher_head + self.student_head

    @property
    def total(self) -> float:
        return self.bodies + self.heads


def paper_update(
    student: Geometry, teacher: Geometry, batch: int, prompt: int, completion: int
) -> UpdateFlops:
    """Counts as the paper does: `bodies` is its sampled update, `total` its full-vocabulary one."""
    length = prompt + completion
    return UpdateFlops(
        teacher_body=paper_forward(teacher, batch, length),
        teacher_head=head(teacher, batch * completion),
        student_body=3 * paper_forward(student, batch, length),
        student_head=3 * head(student, batch * completion),
    )


def update(
    student: Geometry,
    teacher: Geometry | None,
    sequences: Iterable[tuple[int, int]],
    passes: Passes = Passes(),
    reference: Geometry | None = None,
) -> UpdateFlops:
    """Counts what is done for sequences of (tokens read, tokens trained), under any objective.

    Both heads run over the whole vocabulary either way: a token's probability needs it. A teacher
    that is computed elsewhere, None, costs nothing here. A reward's `reference` model is read as
    the teacher is, and counts as a part of it.
    """
    teacher_body = teacher_head = student_body = student_head = 0.0
    for read, trained in sequences:
        student_body += passes.linears * linears(student, read)
        student_body += passes.attention * attention(student, read)
        student_head += passes.head * head(student, trained)
        for frozen in (teacher, reference):
            if frozen is not None:
                teacher_body += linears(frozen, read) + attention(frozen, read)
                teacher_head += head(frozen, trained)
    return UpdateFlops(teacher_body, teacher_head, student_body, student_head)
