"""Rewards that no recipe needs: a half of another one, to see which half does the work."""

from torch import Tensor

from poweropd.rewards import log_ratio


def damped(teacher_log_probs: Tensor, student_log_probs: Tensor, alpha: float = 5.0) -> Tensor:
    """Returns max(t, p)^alpha (ln t - ln p): damped as `power` is, and not bounded.

    `power` is max(t, p)^alpha times sign(d) (1 - exp(-alpha |d|)), with d = ln t - ln p. Its other
    half, which is bounded and not damped, is `tanh` with temperature 2 / alpha:
    (t^alpha - p^alpha) / (t^alpha + p^alpha).
    """
    largest = teacher_log_probs.maximum(student_log_probs)
    return (alpha * largest).exp() * log_ratio(teacher_log_probs, student_log_probs)
