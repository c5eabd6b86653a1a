"""LM heads that never hold the logits of all tokens; torch is all they need.

`linear.py` has the functions for plain tensors, each with its naive equivalent. Each is the front
of a core function that takes a `Head` and also returns statistics of the tokens. `reference.py` is
the oracle: the same functions in a few lines of plain torch.
"""

from poweropd.kernels.comparison import Comparison, compare_heads
from poweropd.kernels.full_vocab import full_vocab_loss
from poweropd.kernels.head import Head
from poweropd.kernels.linear import (
    linear_full_vocab,
    linear_log_prob,
    linear_policy_gradient,
    linear_top_k,
)
from poweropd.kernels.pair import TeacherHead
from poweropd.kernels.sampled import sampled_loss, score_tokens
from poweropd.kernels.statistics import PairStatistics, TokenStatistics
from poweropd.kernels.support import Support
from poweropd.kernels.teacher_top_k import TeacherTopK, score_top_k, top_k_loss

__all__ = [
    "Comparison",
    "Head",
    "PairStatistics",
    "Support",
    "TeacherHead",
    "TeacherTopK",
    "TokenStatistics",
    "compare_heads",
    "full_vocab_loss",
    "linear_full_vocab",
    "linear_log_prob",
    "linear_policy_gradient",
    "linear_top_k",
    "sampled_loss",
    "score_tokens",
    "score_top_k",
    "top_k_loss",
]
