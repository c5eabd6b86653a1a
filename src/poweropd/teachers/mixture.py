"""Several teachers that score every completion together, as one mixture of them."""

from collections.abc import Mapping, Sequence

import torch

from poweropd.data.rollout import Example
from poweropd.teachers.base import TeacherScorer


class MixedTeacher:
    """Scores with the mean of the teachers' probabilities: the log-prob is ln sum_k w_k t_k.

    `weights`, by the teachers' names, are scaled to a sum of 1. What the mixture's entropy and its
    most probable token are is not known from log-probs of single tokens. `shares`, [K] float64, are
    the sums of w_k t_k / sum_j w_j t_j over the tokens collected last: each teacher's part in them.
    """

    def __init__(self, teachers: Mapping[str, TeacherScorer], weights: Mapping[str, float]) -> None:
        self.teachers = dict(teachers)
        own = torch.tensor([weights[name] for name in teachers], dtype=torch.float64)
        self.weights = own / own.sum()
        self.shares = torch.zeros_like(own)

    def submit(self, example: Example) -> None:
        for teacher in self.teachers.values():
            teacher.submit(example)

    def collect(self) -> list[Example]:
        scored = [teacher.collect() for teacher in self.teachers.values()]
        self.shares = torch.zeros_like(self.weights)
        return [self._mixed(parts) for parts in zip(*scored, strict=True)]

    def _mixed(self, parts: Sequence[Example]) -> Example:
        """Returns an example with the mixture's log-probs, given it as each teacher scored it."""
        known = [e.teacher_log_probs for e in parts if e.teacher_log_probs is not None]
        joint = torch.stack(known).double() + self.weights.log()[:, None]  # [K, n], ln w_k t_k
        mixed = joint.logsumexp(0)
        # A token that is impossible to all of them says nothing of who they are.
        shares = (joint - mixed).exp().where(mixed > -torch.inf, self.weights[:, None])
        self.shares += shares.sum(1)
        return parts[0].scored(mixed.float())
