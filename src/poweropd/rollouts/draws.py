"""Draws tokens from logits by the inverse of their cumulative distribution.

Each completion draws one uniform number per token from its own generator and takes the first id
whose cumulative probability exceeds it, so a token depends on its own row and number alone.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from poweropd.data.rollout import Request, Rollout
from poweropd.errors import DivergedError
from poweropd.rollouts.base import Sampling

BLOCK = 256  # ids whose probabilities are first summed together


class Sampler:
    """Draws tokens below `vocab_size` that are not among `masked_ids`, on one device."""

    def __init__(
        self,
        sampling: Sampling,
        vocab_size: int,
        masked_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self.sampling, self.vocab_size, self.device = sampling, vocab_size, device
        self.masked_ids = torch.tensor(masked_ids, dtype=torch.int64, device=device)
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)

    def uniforms(self, seeds: Sequence[int]) -> Tensor:
        """Returns the numbers of completions, [B, max_new_tokens] float64 from [0, 1)."""
        numbers = [
            torch.rand(
                self.sampling.max_new_tokens,
                generator=torch.Generator().manual_seed(seed),
                dtype=torch.float64,
            )
            for seed in seeds
        ]
        return torch.stack(numbers).to(self.device)

    def limit(self, request: Request) -> int:
        """Returns how many tokens a completion may have."""
        return self.sampling.of(request).max_new_tokens

    def draw(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a token for each row of logits, [B, rows of the head], and their log-probs."""
        logits = logits[:, : self.vocab_size].float()
        logits[:, self.masked_ids] = -torch.inf
        return draw(logits, uniforms, self.sampling)

    def has_ended(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Tells which completions end with these tokens, or are damaged, [B] bool."""
        return torch.isin(tokens, self.stop_ids) | ~log_probs.isfinite()

    def rollout(self, request: Request, ids: list[int], log_probs: list[float]) -> Rollout:
        """Makes the rollout of a completion; raises DivergedError if a log-prob is not finite."""
        if not all(map(math.isfinite, log_probs)):
            raise DivergedError(
                "the student's logits are not finite: its training has diverged, so lower "
                "train.learning_rate (or its weights are damaged)"
            )
        return request.rollout(ids, log_probs, ids[-1] in self.sampling.stop_ids)


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draws a token for each row of float32 logits, [B, V], which it overwrites.

    `uniforms` are [B] float64 from [0, 1). Returns ids and their log-probs at temperature 1 over
    all ids, [B] each. Temperature 0 is greedy. Truncation follows transformers: top-k, then top-p.
    """
    if sampling.temperature == 1 and not sampling.top_k and sampling.top_p == 1:
        weights = _weights(logits)
        tokens, total = inverse_cdf(weights, uniforms)
        chosen = weights.gather(1, tokens[:, None]).squeeze(1)
        return tokens, (chosen.double().log() - total.log()).float()
    normaliser = logits.logsumexp(1)
    if sampling.temperature == 0:
        tokens = logits.argmax(1)
    else:
        tokens, _ = inverse_cdf(_weights(_truncated(logits, sampling)), uniforms)
    return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - normaliser


def _truncated(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns the logits at the temperature, with -inf where top-k or top-p leave an id out."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        few = sampling.top_k and logits.device.type == "cpu"
        warper = TopPLogitsWarper(sampling.top_p)
        logits = _among_the_finite(warper, logits) if few else warper(None, logits)
    return logits


def _among_the_finite(warper: TopPLogitsWarper, logits: Tensor) -> Tensor:
    """Applies top-p to the finite logits alone: it sorts, which takes a CPU long for all ids."""
    most = max(1, int(logits.isfinite().sum(1).max()))
    largest, ids = logits.topk(most)
    # In float64, as sums over other numbers of ids are rounded otherwise: what is left of a row
    # must not depend on its neighbours.
    largest = warper(None, largest.double()).float()
    return torch.full_like(logits, -torch.inf).scatter_(1, ids, largest)


def _weights(logits: Tensor) -> Tensor:
    """Turns logits, in place, into probabilities times a factor of each row."""
    return logits.sub_(logits.amax(1, keepdim=True)).exp_()


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first ids whose cumulative weight exceeds uniform * total, and the totals.

    Weights are [B, V] float32, at least 0; ids and float64 totals are [B]. An id of weight 0 is
    never returned. The block of an id is found first, so that float64 copies are [B, V / BLOCK].
    Ids are within [0, V) even if weights are NaN.
    """
    size = weights.shape[1]
    if size <= BLOCK:
        cumulative = weights.double().cumsum(1)
        return _search(cumulative, uniforms)[0], cumulative[:, -1]
    whole = size // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(2)
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], dim=1)
    cumulative = sums.double().cumsum(1)
    total = cumulative[:, -1]
    block, share = _search(cumulative, uniforms)
    ids = block[:, None] * BLOCK + torch.arange(BLOCK, device=weights.device)
    own = weights.gather(1, ids.clamp(max=size - 1)).masked_fill_(ids >= size, 0)
    inside, _ = _search(own.double().cumsum(1), share)
    return (block * BLOCK + inside).clamp(max=size - 1), total


def _search(cumulative: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first index where `cumulative` exceeds uniform * its last column, [B].

    Beside it is how far into that index's own share this number is, from [0, 1).
    """
    last = cumulative[:, -1:]
    # Below the total also if rounding made them equal, so that the index is one of a weight > 0.
    passed = (uniforms[:, None] * last).minimum(last.nextafter(torch.zeros_like(last)))
    index = torch.searchsorted(cumulative, passed, right=True).clamp(max=cumulative.shape[1] - 1)
    upto = cumulative.gather(1, index)
    before = cumulative.gather(1, (index - 1).clamp(min=0)).where(index > 0, 0)
    share = ((passed - before) / (upto - before)).clamp(max=1 - 2**-53)
    return index.squeeze(1), share.squeeze(1)
