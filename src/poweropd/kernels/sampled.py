"""Log-probabilities and the policy gradient of sampled tokens, by chunks of tokens.

Logits exist for one chunk at a time, in one buffer. The gradient is formed right where the
logits are, so that nothing is kept for, or recomputed in, the backward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from poweropd.kernels.chunked_head import ChunkedHead
from poweropd.kernels.head import Head
from poweropd.kernels.pair import TeacherHead
from poweropd.kernels.softmax import check_tokens, softmax_
from poweropd.kernels.statistics import PairStatistics, TokenStatistics
from poweropd.kernels.teacher_top_k import TeacherTopK

# (statistics of a chunk's n tokens, which of the N tokens these are) -> [n]
Coefficient = Callable[[PairStatistics, slice], Tensor]


def score_tokens(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    merged_ids: Tensor | None = None,
    entropy: bool = True,
    chunk_size: int | None = None,
) -> TokenStatistics:
    """Scores targets under an LM head, without a gradient: the core of `linear_log_prob`.

    The entropy costs one more pass over the logits, and is NaN if it is not asked for.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        model = ChunkedHead(hidden, head, targets, merged_ids, chunk_size)
        statistics = TokenStatistics.empty(model.num_tokens, hidden.device)
        for tokens in model.chunks:
            logits = model.logits(tokens)
            actions, summary = model.actions(tokens, logits), softmax_(logits, entropy)
            statistics.record(tokens, summary.log_probs(actions.log_weights), actions, summary)
    return statistics


def sampled_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    coefficient: Coefficient,
    teacher: TeacherHead | TeacherTopK | None = None,
    *,
    merged_ids: Tensor | None = None,
    entropy: bool = True,
    chunk_size: int | None = None,
) -> tuple[Tensor, PairStatistics]:
    """Returns the loss -sum_i sg[c_i] ln p_i and the statistics of all tokens.

    This is the core of `linear_policy_gradient`, whose arguments it takes. `coefficient` is called
    with all that is known of a chunk's tokens. A `teacher` adds its log-probs and, with a reward,
    the values; a `TeacherHead` costs one more head matmul for them::

        def coefficient(statistics, tokens):
            r = reward(statistics.teacher_log_probs, statistics.log_probs)
            return (r - statistics.values) / num_tokens
    """
    more = int(isinstance(teacher, TeacherHead))  # the buffer of the teacher's logits
    student = ChunkedHead(hidden, head, targets, merged_ids, chunk_size, more_buffers=more)
    statistics = PairStatistics.empty(student.num_tokens, hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        pair = None if teacher is None else teacher.beside(student, statistics)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for tokens in student.chunks:
            if pair is None:
                probs = student.logits(tokens)
                actions, summary = student.actions(tokens, probs), softmax_(probs, entropy)
            else:
                probs, actions, summary = pair.probabilities(tokens)
            log_probs = summary.log_probs(actions.log_weights).float()
            statistics.record(tokens, log_probs, actions, summary)
            c = coefficient(statistics.of(tokens), tokens)
            check_tokens("result of the coefficient", c, len(log_probs), None)
            loss -= torch.where(c == 0, 0.0, c * log_probs).sum()
            if student.needs_gradient:
                actions.subtract_from(probs)
                student.add_gradient(probs, c, tokens)
    return student.attach(loss), statistics
