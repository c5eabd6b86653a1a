"""Softmax of [n, V] buffers in place, the target's share of it, and statistics per token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from poweropd.kernels.head import LOWEST, chunks

# In-place softmax goes by tiles of rows, so that its temporary is small, and, on a CPU, in cache.
TILE_BYTES = {"cpu": 2**21, "cuda": 2**28}


@dataclass(frozen=True)
class TokenStatistics:
    """What a kernel fills in, per token, beside its result: [N] each, no gradient.

    `teacher_log_probs` is filled where the call has a teacher head, and is NaN elsewhere.
    """

    entropy: Tensor  # float32, nats: -sum_v p_v ln p_v
    top1: Tensor  # bool: no id has a larger logit than the target
    student_log_probs: Tensor  # float32, ln p of the target; for linear_log_prob its result
    teacher_log_probs: Tensor  # float32, ln t of the teacher's target
    log_support: Tensor  # float32, ln of the student's probability of the support; 0 without one

    @classmethod
    def empty(cls, n: int, device: torch.device | str = "cpu") -> "TokenStatistics":
        """NaN and False until a kernel fills it."""
        nan = [torch.full((n,), torch.nan, device=device) for _ in range(3)]
        no = torch.zeros(n, dtype=torch.bool, device=device)
        return cls(nan[0], no, nan[1], nan[2], torch.zeros(n, device=device))

    def record(
        self, tokens: slice, log_probs: Tensor, actions: "Actions", summary: "SoftmaxSummary"
    ) -> None:
        self.entropy[tokens] = summary.entropy.float()
        self.top1[tokens] = actions.largest >= summary.largest
        self.student_log_probs[tokens] = log_probs


def check_tokens(name: str, values: Tensor, num_tokens: int, dtype: torch.dtype | None) -> None:
    """ValueError unless `values` is [N], of `dtype` if that is given."""
    if values.shape != (num_tokens,) or dtype not in (None, values.dtype):
        expected = f"[{num_tokens}]" + ("" if dtype is None else f" {dtype}")
        raise ValueError(f"{name}: expected {expected}, got {list(values.shape)} {values.dtype}")


def check_statistics(statistics: TokenStatistics | None, num_tokens: int) -> None:
    if statistics is not None:
        check_tokens("statistics.entropy", statistics.entropy, num_tokens, torch.float32)


def unique_ids(merged_ids: Tensor | None) -> Tensor | None:
    """[M] distinct ids, None where there is nothing to merge."""
    if merged_ids is None or merged_ids.numel() == 0:
        return None
    if merged_ids.ndim != 1 or merged_ids.dtype != torch.int64:
        raise ValueError(
            f"merged_ids: expected [M] torch.int64, got {list(merged_ids.shape)} {merged_ids.dtype}"
        )
    return merged_ids.unique()


@dataclass(frozen=True)
class Actions:
    """What each of n tokens did: took its target, or one of the merged ids, whichever of them."""

    targets: Tensor  # [n]
    log_weights: Tensor  # [n] log-sum-exp of the action's logits
    largest: Tensor  # [n] the largest of them
    merged_ids: Tensor | None = None  # [M]
    shares: Tensor | None = None  # [n, M] distribution within the action; 0 for single targets

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, merged_ids: Tensor | None) -> "Actions":
        """From logits, or log-probabilities, [n, V]; keeps no reference to them."""
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
        """p becomes p - q, q being the distribution within the action: minus d ln p / d logits."""
        if self.merged_ids is None or self.shares is None:
            minus = self.log_weights.new_full((len(self.targets), 1), -1.0)
        else:
            probs.index_add_(1, self.merged_ids, self.shares, alpha=-1.0)
            single = ~torch.isin(self.targets, self.merged_ids)
            minus = -single[:, None].to(probs.dtype)
        probs.scatter_add_(1, self.targets[:, None], minus)


def tiles(buffer: Tensor) -> Iterator[slice]:
    """Rows of an [n, V] buffer, so many at a time that they fill a tile."""
    return chunks(buffer.shape[0], _tile_rows(buffer))


def spare_tile(buffer: Tensor) -> Tensor:
    """Uninitialised room for one tile of an [n, V] buffer.

    Temporaries are made once and results written where they stay: small results allocated between
    large temporaries would leave holes in the C heap, a chunk's worth of them.
    """
    return buffer.new_empty(min(_tile_rows(buffer), buffer.shape[0]), buffer.shape[1])


def _tile_rows(buffer: Tensor) -> int:
    budget = TILE_BYTES.get(buffer.device.type, TILE_BYTES["cuda"])
    return max(1, budget // (buffer.shape[1] * buffer.itemsize))


class SoftmaxSummary(NamedTuple):
    """Of each row of logits, [n] each."""

    largest: Tensor
    log_top: Tensor  # log-probability of the largest
    entropy: Tensor  # 0 where it was not asked for

    def log_probs(self, log_weights: Tensor) -> Tensor:
        """Of logits. Taken from the largest, a certain token's is exactly 0: log-sum-exp of large
        logits is rounded by more than ln p, and a power of 500 would show it."""
        return (log_weights - self.largest) + self.log_top


def softmax_(logits: Tensor, entropy: bool) -> SoftmaxSummary:
    """Logits [n, V] become probabilities, with one exp each."""
    largest, log_top, mean = (logits.new_empty(logits.shape[0]) for _ in range(3))
    spare = spare_tile(logits)
    for rows in tiles(logits):
        tile, probs = logits[rows], spare[: rows.stop - rows.start]
        torch.amax(tile, 1, out=largest[rows])
        torch.softmax(tile, 1, out=probs)
        torch.amax(probs, 1, out=log_top[rows])
        if entropy:
            torch.sum(tile.mul_(probs), 1, out=mean[rows])
        tile.copy_(probs)
    # The largest probability is exp(0) / sum, at least 1 / V: its logarithm loses nothing.
    log_top.log_()
    return SoftmaxSummary(largest, log_top, largest - mean - log_top if entropy else mean.zero_())


def log_softmax_(logits: Tensor) -> None:
    """Logits [n, V] become log-probabilities."""
    spare = spare_tile(logits)
    for rows in tiles(logits):
        logits[rows] = torch.log_softmax(logits[rows], 1, out=spare[: rows.stop - rows.start])


def summary_of(log_probs: Tensor) -> SoftmaxSummary:
    """Of log-probabilities [n, V]."""
    entropy = log_probs.new_empty(log_probs.shape[0])
    spare = spare_tile(log_probs)
    for rows in tiles(log_probs):
        weighted = torch.exp(log_probs[rows], out=spare[: rows.stop - rows.start])
        torch.sum(weighted.mul_(log_probs[rows]), 1, out=entropy[rows])
    largest = log_probs.amax(1)
    return SoftmaxSummary(largest, largest, entropy.neg_())


def expectation(probs: Tensor, values: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """sum_v p_v x_v of [n, V] tiles, [n], and x less it, in `spare` [n, V].

    By two passes: a mean's own rounding, and that of the sum of p, are as large as what is left
    of x around a near-certain token. The second pass sees only what is left.
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
