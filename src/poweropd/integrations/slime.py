"""slime: an advantage function for `--custom-advantage-function-path`.

Needs `--use-opd --opd-kl-coef 0`: only with the first flag does slime compute the teacher's
log-probs, and with the second it adds no log ratio to what this returns.
"""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import torch

from poweropd.errors import UsageError
from poweropd.integrations.core import Advantages, check_temperature, reward_from_environment
from poweropd.integrations.peers import PROBE_STUDENT, PROBE_TEACHER, Peer, Probe


class Slime(Peer):
    """slime, as far as this adapter depends on it."""

    distribution = "slime"
    tested = "commit 624b824"
    flag = "--custom-advantage-function-path poweropd.integrations.slime.advantages"

    def probe(self) -> Probe:
        """Runs the function that slime itself loads by its path."""
        from slime.utils.misc import load_function

        function = load_function("poweropd.integrations.slime.advantages")
        args = SimpleNamespace(
            use_opd=True, opd_kl_coef=0.0, rollout_temperature=1.0, use_rollout_logprobs=False
        )
        batch: dict[str, Any] = {
            "teacher_log_probs": [torch.tensor(PROBE_TEACHER)],
            "log_probs": [torch.tensor(PROBE_STUDENT)],
            "loss_masks": [torch.ones(2)],
        }
        function(args, batch)
        return Probe(tuple(batch["advantages"][0].tolist()), "slime's own load_function")


def advantages(args: Namespace, rollout_data: dict[str, Any]) -> None:
    """Sets "advantages" and "returns" of a batch to the reward of every sampled token.

    args: slime's own. rollout_data: slime's batch, lists of tensors [T] with one entry for each
    completion: "teacher_log_probs", "log_probs" (or "rollout_log_probs", with
    `--use-rollout-logprobs`) and "loss_masks".

    Raises UsageError if a flag is missing, or completions are not sampled at temperature 1.
    """
    if not args.use_opd or args.opd_kl_coef != 0:
        raise UsageError(
            "slime: expected --use-opd --opd-kl-coef 0, got "
            f"use_opd={args.use_opd} and opd_kl_coef={args.opd_kl_coef}"
        )
    check_temperature("slime: --rollout-temperature", args.rollout_temperature)
    name = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
    for key in (name, "teacher_log_probs", "loss_masks"):
        if rollout_data.get(key) is None:
            raise Slime().refusal(f"the batch has no {key!r}")
    of = Advantages(reward_from_environment())
    found = [
        of(teacher.to(student.device), student, mask.to(student.device))
        for teacher, student, mask in zip(
            rollout_data["teacher_log_probs"],
            rollout_data[name],
            rollout_data["loss_masks"],
            strict=True,
        )
    ]
    rollout_data["advantages"] = found
    rollout_data["returns"] = list(found)
