"""Softmax of [n, V] buffers in place, and the target's share of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd.kernels.head import LOWEST, chunks

# In-place softmax goes by tiles of a few tokens, so that its temporary is small, and, on a CPU, in
# cache.
TILE_BYTES = {"cpu": 2**21, "cuda": 2**28}


def check_tokens(name: str, values: Tensor, num_tokens: int, dtype: torch.dtype | None) -> None:
    """Raises ValueError unless `values` is [N], and of `dtype` if that is given."""
    if values.shape != (num_tokens,) or dtype not in (None, values.dtype):
        expected = f"[{num_tokens}]" + ("" if dtype is None else f" {dtype}")
        raise ValueError(f"{name}: expected {expected}, got {list(values.shape)} {values.dtype}")


def weights_of(token_weight: Tensor | float, num_tokens: int, device: torch.device | str) -> Tensor:
    """Returns the weights [N] float32 of tokens; raises ValueError for a wrong shape."""
    weights = torch.as_tensor(token_weight, dtype=torch.float32, device=device).detach()
    if weights.ndim:
        check_tokens("token_weight", weights, num_tokens, None)
    return weights.expand(num_tokens)


def unique_ids(merged_ids: Tensor | None) -> Tensor | None:
    """Returns the distinct ids [M], or None if there is nothing to merge.

    Raises ValueError for a wrong shape or dtype.
    """
    if merged_ids is None or merged_ids.numel() == 0:
        return None
    if merged_ids.ndim != 1 or merged_ids.dtype != torch.int64:
        raise ValueError(
            f"merged_ids: expected [M] torch.int64, got {list(merged_ids.shape)} {merged_ids.dtype}"
        )
    return merged_ids.unique()


@dataclass(frozen=True)
class Actions:
    """What each of n tokens did: it took its target, or any of the merged ids."""

    targets: Tensor  # [n]
    log_weights: Tensor  # [n] log-sum-exp of the action's logits
    largest: Tensor  # [n] the largest of them
    merged_ids: Tensor | None = None  # [M]
    shares: Tensor | None = None  # [n, M] distribution within the action; 0 for single targets

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, merged_ids: Tensor | None) -> "Actions":
        """Returns the actions of logits, or log-probs, [n, V]; keeps no reference to them."""
        own = logits.gather(1, targets[:, None]).squeeze(1)
        if merged_ids is None:
            return cls(targets, own, own)
        merged, group = torch.isin(targets, merged_ids), logits[:, merged_ids]  # [n], [n, M]
        return cls(
            targets,
            torch.where(merged, group.logsumexp(1), own),
            torch.where(merged, group.amax(1), own),
            merged_ids,
            group.softmax(1) * merged[:, None],
        )

    def subtract_from(self, probs: Tensor) -> None:
        """Turns p [n, V] into p - q, which is minus d ln p / d logits of the action.

        q is the distribution within the action.
        """
        if self.merged_ids is None or self.shares is None:
            minus = self.log_weights.new_full((len(self.targets), 1), -1.0)
        else:
            probs.index_add_(1, self.merged_ids, self.shares, alpha=-1.0)
            single = ~torch.isin(self.targets, self.merged_ids)
            minus = -single[:, None].to(probs.dtype)
        probs.scatter_add_(1, self.targets[:, None], minus)


def tiles(buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of the tokens of an [n, V] buffer that fill a tile, and room for one tile.

    The room is uninitialised, and is the same for every tile. Temporaries are made once and results
    written where they stay: small results allocated between large temporaries would leave holes in
    the C heap, a chunk's worth of them.
    """
    budget = TILE_BYTES.get(buffer.device.type, TILE_BYTES["cuda"])
    rows = max(1, budget // (buffer.shape[1] * buffer.itemsize))
    spare = buffer.new_empty(min(rows, buffer.shape[0]), buffer.shape[1])
    for tokens in chunks(buffer.shape[0], rows):
        yield tokens, spare[: tokens.stop - tokens.start]


class SoftmaxSummary(NamedTuple):
    """What is known of each token's softmax, [n] each."""

    largest: Tensor
    log_top: Tensor  # log-probability of the largest
    entropy: Tensor  # nats; NaN if it was not asked for

    def log_probs(self, log_weights: Tensor) -> Tensor:
        """Returns the log-probabilities [n] of logits [n].

        They are taken from the largest, so that a certain token's is exactly 0: the log-sum-exp of
        large logits is rounded by more than ln p, and a power of 500 would show it.
        """
        return (log_weights - self.largest) + self.log_top


def softmax_(logits: Tensor, entropy: bool) -> SoftmaxSummary:
    """Turns logits [n, V] into probabilities, with one exp each."""
    largest, log_top, mean = (logits.new_empty(logits.shape[0]) for _ in range(3))
    for rows, probs in tiles(logits):
        tile = logits[rows]
        torch.amax(tile, 1, out=largest[rows])
        torch.softmax(tile, 1, out=probs)
        torch.amax(probs, 1, out=log_top[rows])
        if entropy:
            torch.sum(tile.mul_(probs), 1, out=mean[rows])
        tile.copy_(probs)
    # The largest probability is exp(0) / sum, at least 1 / V: its logarithm loses nothing.
    log_top.log_()
    nats = largest - mean - log_top if entropy else mean.fill_(torch.nan)
    return SoftmaxSummary(largest, log_top, nats)


def log_softmax_(logits: Tensor) -> None:
    """Turns logits [n, V] into log-probabilities."""
    for rows, spare in tiles(logits):
        logits[rows] = torch.log_softmax(logits[rows], 1, out=spare)


def summary_of(log_probs: Tensor) -> SoftmaxSummary:
    """Returns the summary of log-probabilities [n, V]."""
    entropy = log_probs.new_empty(log_probs.shape[0])
    for rows, spare in tiles(log_probs):
        weighted = torch.exp(log_probs[rows], out=spare).mul_(log_probs[rows])
        torch.sum(weighted, 1, out=entropy[rows])
    largest = log_probs.amax(1)
    return SoftmaxSummary(largest, largest, entropy.neg_())


def expectation(probs: Tensor, values: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sum_v p_v x_v [n] of [n, V] tiles, and x less that sum, in `spare` [n, V].

    Two passes are needed: a mean's own rounding, and that of the sum of p, are as large as what is
    left of x around a near-certain token. The second pass sees only what is left.
    """
    mean = torch.mul(probs, values, out=spare).sum(1)
    rest = torch.mul(torch.sub(values, mean[:, None], out=spare), probs).sum(1)
    return mean + rest, spare.sub_(rest[:, None])


def merge_(log_probs: Tensor, merged_ids: Tensor | None) -> Tensor | None:
    """Makes the merged ids one action, held by the first of them; the others become impossible.

    Returns its distribution q [n, M] over the ids.
    """
    if merged_ids is None:
        return None
    group = log_probs[:, merged_ids]
    log_probs[:, merged_ids] = LOWEST
    log_probs[:, merged_ids[0]] = group.logsumexp(1)
    return group.softmax(1)


def unmerge_(d_logits: Tensor, merged_ids: Tensor | None, shares: Tensor | None) -> None:
    """Spreads the merged action's logit gradient over its ids, by their shares."""
    if merged_ids is not None and shares is not None:
        d_logits[:, merged_ids] = d_logits[:, merged_ids[0], None] * shares
