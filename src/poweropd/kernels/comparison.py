"""Two models compared over the whole vocabulary, in each context, without training on it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poweropd.kernels.chunked_head import ChunkedHead
from poweropd.kernels.head import Head
from poweropd.kernels.pair import PairForward, TeacherHead
from poweropd.kernels.softmax import expectation, log_softmax_, merge_, summary_of, tiles
from poweropd.kernels.statistics import PairStatistics


@dataclass(frozen=True)
class Comparison:
    """What is known of N contexts; the teacher's columns are empty if its head was not given."""

    statistics: PairStatistics  # of the targets
    reverse_kl: Tensor  # [N] float32, nats: sum_v p_v (ln p_v - ln t_v), exact; or NaN
    greedy: Tensor  # [N] int64, the student's most probable id
    teacher_greedy: Tensor  # [N] int64, the teacher's; or -1
    forward_kl: Tensor  # [N] float32, nats: sum_v t_v (ln t_v - ln p_v); NaN without a top_k
    teacher_mass: Tensor  # [N] float32, the teacher's mass on the student's top_k ids; or NaN


def compare_heads(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    teacher: TeacherHead | None = None,
    *,
    top_k: int | None = None,
    merged_ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> Comparison:
    """Compares a student's distributions with a teacher's, without a gradient.

    The naive equivalent, with [N, V] log-probabilities p and t of both heads::

        reverse_kl = (p.exp() * (p - t)).sum(-1)
        greedy, teacher_greedy = p.argmax(-1), t.argmax(-1)
        forward_kl = (t.exp() * (t - p)).sum(-1)                          # these two with top_k
        teacher_mass = t.gather(1, p.topk(top_k).indices).exp().sum(-1)

    One head matmul is needed for each model. The ids `merged_ids` [M] int64 are one action of both
    models, whose number is the smallest of them; a model's greedy action may be that one. Of equal
    ones the first is the greedy one.
    """
    student = ChunkedHead(
        hidden, head, targets, merged_ids, chunk_size, more_buffers=int(teacher is not None)
    )
    n, device = student.num_tokens, hidden.device
    statistics = PairStatistics.empty(n, device)
    reverse_kl, forward_kl, teacher_mass = (
        torch.full((n,), torch.nan, device=device) for _ in range(3)
    )
    greedy, teacher_greedy = (torch.full((n,), -1, device=device) for _ in range(2))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        pair = None if teacher is None else PairForward(student, teacher, statistics)
        for tokens in student.chunks:
            if pair is None:
                log_p = student.logits(tokens)
                log_softmax_(log_p)
                actions, summary = student.actions(tokens, log_p), summary_of(log_p)
                merge_(log_p, student.merged_ids)
            else:
                log_p, log_t = pair.log_probs(tokens)
                actions, summary = pair.score(tokens, log_p, log_t)
                merge_(log_p, student.merged_ids)
                merge_(log_t, student.merged_ids)
                reverse_kl[tokens] = _kl(log_p, log_t).float()
                if top_k is not None:
                    forward_kl[tokens] = _kl(log_t, log_p).float()
                    likely = log_p.topk(min(top_k, log_p.shape[1])).indices
                    teacher_mass[tokens] = log_t.gather(1, likely).exp().sum(1).float()
                teacher_greedy[tokens] = log_t.argmax(1)
            statistics.record(tokens, actions.log_weights.float(), actions, summary)
            greedy[tokens] = log_p.argmax(1)
    return Comparison(statistics, reverse_kl, greedy, teacher_greedy, forward_kl, teacher_mass)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """Returns sum_v p_v (ln p_v - ln q_v) [n] of log-probabilities [n, V], p of the first."""
    found = first.new_empty(first.shape[0])
    for rows, spare in tiles(first):
        p = first[rows]
        found[rows], _ = expectation(p.exp(), p - second[rows], spare)
    return found
