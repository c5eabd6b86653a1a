"""The exact expectation of sampled distillation over the vocabulary, by chunks of tokens."""

from functools import partial

import torch
from torch import Tensor

from poweropd.kernels.chunked_head import ChunkedHead
from poweropd.kernels.head import Head
from poweropd.kernels.pair import PairForward, Pointwise, TeacherHead, rewards_of
from poweropd.kernels.softmax import expectation, merge_, tiles, unmerge_, weights_of
from poweropd.kernels.statistics import PairStatistics


def full_vocab_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor | None,
    teacher: TeacherHead,
    token_weight: Tensor | float,
    *,
    divergence: Pointwise | None = None,
    top_k: int | None = None,
    merged_ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, PairStatistics]:
    """Returns the loss of `linear_full_vocab`, whose core this is, and the tokens' statistics.

    The teacher has to have a reward; `divergence` is what the front calls `value`. The statistics
    are those of `targets` [N] int64, the sampled tokens, which take no part in the loss. Without
    targets they are not known, and a support, to which the target always belongs, is refused.
    """
    student = ChunkedHead(hidden, head, targets, merged_ids, chunk_size, more_buffers=1)
    reward, num_tokens, vocab_size = teacher.reward, student.num_tokens, student.vocab_size
    weights = weights_of(token_weight, num_tokens, hidden.device)
    if reward is None:
        raise ValueError("teacher reward: expected the reward to train with, got None")
    if targets is None and teacher.support is not None:
        raise ValueError("targets: expected [N] torch.int64 beside a support, got None")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k: expected 1 to {vocab_size}, got {top_k}")
    to_gradient_ = _dense_ if top_k is None else partial(_on_top_k_, top_k)
    statistics = PairStatistics.empty(num_tokens, hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        pair = PairForward(student, teacher, statistics)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for tokens in student.chunks:
            log_p, log_t = pair.log_probs(tokens)
            if targets is not None:
                actions, summary = pair.score(tokens, log_p, log_t)
                statistics.record(tokens, actions.log_weights, actions, summary)
            shares = merge_(log_p, student.merged_ids)
            merge_(log_t, student.merged_ids)
            divergences = to_gradient_(log_t, log_p, reward, divergence)
            unmerge_(log_p, student.merged_ids, shares)
            w = weights[tokens]
            loss += torch.where(w == 0, 0.0, w * divergences).sum()
            if student.needs_gradient:
                student.add_gradient(log_p, w, tokens)
    return student.attach(loss), statistics


def _dense_(
    teacher: Tensor, student: Tensor, reward: Pointwise, divergence: Pointwise | None
) -> Tensor:
    """Turns the student's log-probs [n, V] into -p (r - sum_v p_v r_v), the logits' gradient.

    Returns the divergences [n]: the given ones, else -sum_v p_v r_v.
    """
    divergences = student.new_empty(student.shape[0])
    # By tiles, so that whatever the reward makes on its way is small, and, on a CPU, in cache.
    for rows, spare in tiles(student):
        t, log_probs = teacher[rows], student[rows]
        r = rewards_of(reward, t, log_probs)
        if divergence is not None:
            divergences[rows] = divergence(t, log_probs)
        probs = log_probs.exp()
        expected, advantage = expectation(probs, r, spare)
        if divergence is None:
            divergences[rows] = -expected
        torch.mul(probs, advantage, out=log_probs).neg_()
    return divergences


def _on_top_k_(
    k: int, teacher: Tensor, student: Tensor, reward: Pointwise, divergence: Pointwise | None
) -> Tensor:
    """Does as `_dense_`, with the sums, and the rewards, over the k most probable ids S alone.

    The student's log-probs [n, V] become -p ([v in S] r - sum over S of p r).
    """
    ids = student.topk(k, dim=1, sorted=False).indices
    t, p = teacher.gather(1, ids), student.gather(1, ids)  # [n, k]
    weighted = p.exp() * rewards_of(reward, t, p)
    expected = weighted.sum(1)
    student.exp_().mul_(expected[:, None]).scatter_add_(1, ids, -weighted)
    return -expected if divergence is None else divergence(t, p)
