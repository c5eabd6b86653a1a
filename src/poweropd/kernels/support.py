"""Scoring under a truncating sampler's own support, instead of the whole vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.kernels.head import LOWEST
from poweropd.kernels.softmax import TILE_BYTES


@dataclass(frozen=True)
class Support:
    """Which ids a sampler with top-k and top-p can draw in a context.

    The student's logits are divided by `temperature`; the `top_k` largest stay (0: all), and of
    these the most probable ones, until their probabilities sum to `top_p`. This is what
    transformers' top-k and top-p warpers keep, one after the other, ties at the k-th included.
    """

    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0

    def contains(self, log_probs: Tensor) -> Tensor:
        """Returns [n, V] bool, whether an id can be drawn, from log-probs or logits [n, V]."""
        scores, candidates = log_probs / self.temperature, log_probs.shape[1]
        lowest = scores.new_full((1,), -torch.inf)
        if 0 < self.top_k < candidates:
            lowest = scores.topk(self.top_k).values[:, -1:]
            candidates = int((scores >= lowest).sum(1).max())
        largest, ids = scores.topk(candidates)
        largest = largest.masked_fill(largest < lowest, -torch.inf)
        # Summed from the least probable up, as the warper does.
        tail = largest.softmax(1).flip(1).cumsum(1).flip(1)
        kept = tail > 1 - self.top_p
        kept[:, 0] = True
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids, kept)

    def outside(self, log_probs: Tensor, targets: Tensor) -> Tensor:
        """Returns [n, V] bool: ids that cannot be drawn. The target [n], which was, always can."""
        rows = max(1, TILE_BYTES["cuda"] // (log_probs.shape[1] * log_probs.itemsize))
        outside = torch.cat([~self.contains(part) for part in log_probs.split(rows)])
        return outside.scatter_(1, targets[:, None], False)


def restrict_(log_probs: Tensor, outside: Tensor) -> Tensor:
    """Makes ids outside impossible and the others sum to one; returns ln of their old sum [n]."""
    log_probs.masked_fill_(outside, LOWEST)
    log_mass = log_probs.logsumexp(1)
    log_probs.sub_(log_mass[:, None])
    return log_mass
