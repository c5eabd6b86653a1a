"""NeMo-RL: a launcher that puts a reward into the estimator `grpo.adv_estimator.name: opd`.

    python -m poweropd.integrations.nemo_rl examples/run_grpo.py --config CONFIG ...

runs NeMo-RL's own script, with everything that its command line takes.
"""

import runpy
import sys
from typing import Any

import torch
from torch import Tensor

from poweropd.errors import UsageError
from poweropd.integrations.core import Advantages, reward_from_environment
from poweropd.integrations.peers import PROBE_STUDENT, PROBE_TEACHER, Peer, Probe


class NeMoRL(Peer):
    """nemo-rl, as far as this adapter depends on it."""

    distribution = "nemo-rl"
    tested = "commit 7ea279a"
    flag = "python -m poweropd.integrations.nemo_rl examples/run_grpo.py"

    def probe(self) -> Probe:
        """Runs the estimator as NeMo-RL makes it."""
        from nemo_rl.algorithms.advantage_estimator import OPDAdvantageEstimator

        replace_method()
        found = OPDAdvantageEstimator({"name": "opd"}, {}).compute_advantage(
            prompt_ids=None,
            rewards=None,
            mask=torch.ones(1, 2),
            teacher_logprobs=torch.tensor([PROBE_TEACHER]),
            prev_logprobs=torch.tensor([PROBE_STUDENT]),
        )
        return Probe(tuple(found[0].tolist()), "OPDAdvantageEstimator.compute_advantage")


def compute_advantage(
    self: Any,
    prompt_ids: Tensor,
    rewards: Tensor,
    mask: Tensor,
    teacher_logprobs: Tensor | None = None,
    prev_logprobs: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Returns the reward of every sampled token, [B, S], as a method of NeMo-RL's estimator."""
    if teacher_logprobs is None or prev_logprobs is None:
        raise UsageError("nemo-rl: expected the teacher's and the student's log-probs, got none")
    of = Advantages(reward_from_environment(), whole_step=True)
    found = of(teacher_logprobs, prev_logprobs, mask)
    self._compute_metrics(found, found, mask)
    return found


def replace_method() -> None:
    """Replaces the estimator's method; raises UsageError if it is not what it was."""
    peer, module = NeMoRL(), "nemo_rl.algorithms.advantage_estimator"
    estimator: Any = peer.attribute(module, "OPDAdvantageEstimator")
    peer.check_parameters(
        estimator._compute_metrics, ["self", "distill_advantages", "advantages", "mask"]
    )
    peer.replace(
        module,
        "OPDAdvantageEstimator.compute_advantage",
        compute_advantage,
        ["self", "prompt_ids", "rewards", "mask", "teacher_logprobs", "prev_logprobs"],
    )


def launch() -> None:
    """Runs a script of NeMo-RL with the reward in its estimator."""
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: python -m {__spec__.name} SCRIPT [ARGUMENTS]")
    replace_method()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    launch()
