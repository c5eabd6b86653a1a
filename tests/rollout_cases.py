"""Requests and rollouts made by hand."""

from collections.abc import Sequence

from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Request, Rollout


def make_request(
    index: int,
    prompt_ids: list[int],
    teacher_prompt_ids: list[int] | None = None,
    sample: int = 0,
    seed: int = 0,
) -> Request:
    """The teacher's prompt is the student's unless it is given."""
    teacher = prompt_ids if teacher_prompt_ids is None else teacher_prompt_ids
    return Request(Prompt(index, prompt_ids, teacher), index, sample, seed)


def make_rollout(
    index: int,
    prompt_ids: list[int],
    completion_ids: Sequence[int],
    *,
    log_probs: Sequence[float] = (),
    stopped: bool = True,
    teacher_prompt_ids: list[int] | None = None,
    sample: int = 0,
) -> Rollout:
    request = make_request(index, prompt_ids, teacher_prompt_ids, sample)
    return request.rollout(list(completion_ids), list(log_probs), stopped)
