"""The student as its own teacher: its module, with the weights of before, of now, or averaged.

No second module is loaded. While the teacher reads, its weights are put in the places of the
trained ones, and those come back behind it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from poweropd.models.language_model import Student, Teacher


class MovingAverage:
    """The moving average of a student's trained weights w: a <- decay a + (1 - decay) w."""

    def __init__(self, student: Student, decay: float) -> None:
        """Starts at the student's weights as they are."""
        self.student, self.decay = student, decay
        self.weights = {n: p.detach().clone() for n, p in student.trained_weights().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes up the student's weights; it is called after each optimizer step."""
        for name, parameter in self.student.trained_weights().items():
            self.weights[name].lerp_(parameter, 1 - self.decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copies the weights of an average of the same student."""
        for name, own in self.weights.items():
            own.copy_(weights[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average in the places of the trained weights, which come back at the end."""
        trained = self.student.trained_weights()
        live = {name: parameter.data for name, parameter in trained.items()}
        for name, parameter in trained.items():
            parameter.data = self.weights[name]
        try:
            yield
        finally:
            for name, parameter in trained.items():
                parameter.data = live[name]


def own_teacher(student: Student, average: MovingAverage | None, base: bool) -> Teacher:
    """Returns the student's module as a teacher: by its average, or as it is now if that is None.

    With `base` it is the model that the student's adapter was added to.
    """
    # The wrapper of peft is not in the types of transformers.
    wrapper: Any = student.model
    weights: Callable[[], AbstractContextManager[object]] = nullcontext
    if base:
        weights = wrapper.disable_adapter
    elif average is not None:
        weights = average.in_place

    @contextmanager
    def reading() -> Iterator[None]:
        training = student.model.training  # as gradient checkpointing needs it
        student.model.eval()
        try:
            with weights():
                yield
        finally:
            student.model.train(training)

    sizes = (student.vocab_size, student.compute_dtype, student.masked_ids)
    return Teacher(student.model, *sizes, lora=student.lora, reading=reading)
