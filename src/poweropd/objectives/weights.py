"""Token weights: how much each trained token of a completion counts in the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.objectives.scoring import TokenScores, distances


@dataclass(frozen=True)
class Drift:
    """1 + gamma (1 - F): less where the student has drifted from the teacher (IW-OPD).

    F is the share of the completion's sum of |ln t - ln p| that stands before the token. So a
    weight falls from 1 + gamma at the first trained token to 1 (arXiv:2606.22600, in the form of
    its released code, whose maximum of 1.5 is a gamma of 0.5).
    """

    gamma: float

    def of(self, batch: Batch, scores: TokenScores) -> Tensor:
        """Returns the weights [N], float32."""
        distance = distances(*scores.log_probs).double()
        parts = [self._of_completion(part) for part in batch.by_completion(distance)]
        return torch.cat([distance[:0], *parts]).float()

    def _of_completion(self, distance: Tensor) -> Tensor:
        """Returns the weights of a completion's tokens, 1 + gamma of all if there is no drift."""
        before = distance.cumsum(0) - distance
        share = before / distance.sum().clamp(min=torch.finfo(distance.dtype).tiny)
        return 1 + self.gamma * (1 - share.clamp(0, 1))
