"""The kernels for plain tensors: one front for each core function, with its naive equivalent.

All of them raise ValueError, with what was expected and got, for wrong shapes or dtypes.
"""

from collections.abc import Callable
from typing import Unpack

from torch import Tensor

from poweropd.kernels.full_vocab import full_vocab_loss
from poweropd.kernels.head import Head, HeadOptions
from poweropd.kernels.pair import Pointwise, TeacherHead
from poweropd.kernels.sampled import sampled_loss, score_tokens
from poweropd.kernels.teacher_top_k import TeacherTopK, top_k_loss


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    merged_ids: Tensor | None = None,
    chunk_size: int | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor:
    """Returns the log-probabilities of targets under an LM head: [N] float32, no gradient.

    The naive equivalent, for which one head matmul is needed::

        logits = scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap) / temperature
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    Args:
        hidden: [N, H], any float dtype.
        weight: [V, H], any float dtype; the matmuls take it in the dtype of `hidden`.
        targets: [N] int64 ids in [0, V).
        merged_ids: [M] int64. A target among them counts as the action "any of them", whose
            probability is their sum (semantic stop, arXiv:2609.20511).
        chunk_size: tokens per chunk; if None, as many as fit into a fixed memory.
        options: the head's `bias` [V], `scale`, `softcap` and `temperature`, as in `Head`.
    """
    head = Head(weight, **options)
    scored = score_tokens(
        hidden, head, targets, merged_ids=merged_ids, entropy=False, chunk_size=chunk_size
    )
    return scored.log_probs


def linear_policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficient: Callable[[Tensor, slice], Tensor],
    *,
    merged_ids: Tensor | None = None,
    chunk_size: int | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor:
    """Returns PowerOPD's loss -sum_i sg[c_i] ln p_i, a float32 scalar (arXiv:2606.17199).

    The naive equivalent, with `log_prob` that of `linear_log_prob` with a gradient::

        student_log_probs = log_prob(hidden, weight, targets, ...)
        c = coefficient(student_log_probs.detach(), slice(0, N))
        return -(c * student_log_probs).sum()

    Three head matmuls are needed in all: the logits, and the gradients of `hidden` and `weight`,
    which are formed in the forward. A token whose coefficient is exactly zero takes part in the
    first only. The loss can be backpropagated once.

    Args:
        hidden, weight, targets, merged_ids, chunk_size, options: as in `linear_log_prob`.
            Gradients reach `hidden`, `weight` and `bias` if they require one, in their dtypes;
            they are summed over chunks in float32.
        coefficient: called once per chunk, in order, without gradient, with the student's
            log-probs [n] float32 and the slice of the N tokens they belong to; returns [n].
            Rewards, token weights and 1 / N are all in it.
    """
    loss, _ = sampled_loss(
        hidden,
        Head(weight, **options),
        targets,
        lambda statistics, tokens: coefficient(statistics.log_probs, tokens),
        merged_ids=merged_ids,
        entropy=False,
        chunk_size=chunk_size,
    )
    return loss


def linear_full_vocab(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    reward: Pointwise,
    token_weight: Tensor | float,
    *,
    value: Pointwise | None = None,
    top_k: int | None = None,
    teacher_options: HeadOptions | None = None,
    merged_ids: Tensor | None = None,
    chunk_size: int | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor:
    """Returns the loss of full-vocabulary distillation with any pointwise reward r(t, p).

    Its gradient is -sum_i w_i sum_v sg[p_v r(t_v, p_v)] grad ln p_v, which is the expected
    gradient of the sampled loss (PowerOPD, arXiv:2606.17199) over the student's own next token.
    By the logits it is -w p_u (r_u - sum_v p_v r_v). Its value, a float32 scalar, is
    sum_i w_i D_i, with D = value(...) if that is given, else -sum_v p_v r_v, which for
    r = ln t - ln p is the reverse KL. The naive equivalent, up to that value::

        student = log_softmax(head(hidden)); teacher = log_softmax(teacher_head(teacher_hidden))
        r = reward(teacher, student.detach())                            # [N, V]
        per_token = (student.detach().exp() * r * student).sum(-1)
        return -(token_weight * per_token).sum()

    With `top_k` both sums over v run over S, the student's k most probable ids, only, with p and
    t still softmaxes over the whole vocabulary. By the logits the gradient is then
    -w p_u ([u in S] r_u - sum_{v in S} p_v r_v), and `value` sees [n, k] log-probs.

    Four head matmuls are needed: both logits, and the gradients of `hidden` and `weight`, which
    are formed in the forward. A token of weight zero takes no part in the latter. The loss can
    be backpropagated once.

    Args:
        hidden [N, H], weight [V, H], merged_ids, chunk_size, options: the student's, as in
            `linear_policy_gradient`. Merged ids are one action on both sides: to `reward` the
            smallest of them has their summed probability, and the others have none (about -1e30).
        teacher_hidden [N, H_teacher], teacher_weight [V, H_teacher]: no gradient reaches them.
            The weights of both models have to be sliced to the ids that both models have.
        teacher_options: the options of the teacher's head.
        reward: (teacher log-probs, student log-probs), [n, V] float32 each -> [n, V] float32,
            without gradient. It is called on a few tokens at a time, and must not change them.
        token_weight: [N], or one number for all.
    """
    teacher = TeacherHead(
        teacher_hidden, Head(teacher_weight, **(teacher_options or {})), reward=reward
    )
    loss, _ = full_vocab_loss(
        hidden,
        Head(weight, **options),
        None,
        teacher,
        token_weight,
        divergence=value,
        top_k=top_k,
        merged_ids=merged_ids,
        chunk_size=chunk_size,
    )
    return loss


def linear_top_k(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    reward: Pointwise,
    token_weight: Tensor | float,
    *,
    value: Pointwise | None = None,
    chunk_size: int | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor:
    """Returns the full-vocabulary loss over the teacher's k most probable ids and a tail.

    The tail is one outcome that stands for all other ids: its probabilities T and P are what the
    k ids leave of 1. So any teacher will do that tells k log-probs. The gradient is
    -sum_i w_i (sum_{v in K} sg[p_v r(t_v, p_v)] grad ln p_v + sg[P r(T, P)] grad ln P). By the
    logits it is -w p_u (r_u - V), where each u outside K has the tail's reward and V is the sum of
    p r over the k + 1 outcomes. Its value, a float32 scalar, is sum_i w_i D_i, with D = value(...)
    of the outcomes' log-probs [n, k + 1] if that is given, else -V. With all V ids it is the loss
    of `linear_full_vocab`. The naive equivalent, up to that value::

        student = log_softmax(head(hidden))
        p = student.gather(1, teacher_ids)
        p = cat([p, log(1 - p.exp().sum(-1, keepdim=True))], -1)
        t = cat([teacher_log_probs, log(1 - teacher_log_probs.exp().sum(-1, keepdim=True))], -1)
        r = reward(t, p.detach())                                        # [N, k + 1]
        return -(token_weight * (p.detach().exp() * r * p).sum(-1)).sum()

    T counts as at least 1e-6 where P is above 0: that much is lost in float32 sums near 1. Three
    head matmuls are needed, as in `linear_policy_gradient`.

    Args:
        hidden [N, H], weight [V, H], token_weight, chunk_size, options: as in `linear_full_vocab`.
        teacher_ids: [N, k] int64, distinct within a context. One outside [0, V) is an outcome to
            which the student gives probability 0.
        teacher_log_probs: [N, k], ln t by the teacher's full softmax.
        reward: (teacher log-probs, student log-probs), [n, k + 1] each -> [n, k + 1].
    """
    no_targets = teacher_ids.new_zeros(len(teacher_ids))
    teacher = TeacherTopK(teacher_ids, teacher_log_probs, no_targets.float(), reward)
    loss, _ = top_k_loss(
        hidden,
        Head(weight, **options),
        no_targets,
        teacher,
        token_weight,
        divergence=value,
        chunk_size=chunk_size,
    )
    return loss
