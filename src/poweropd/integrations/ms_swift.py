"""ms-swift: `--external_plugins` with this file replaces its teacher log ratio by a reward.

Needs `--teacher_kl_coef 1`, or what the reward is to weigh beside ms-swift's own advantages.
"""

import torch
from torch import Tensor

from poweropd.integrations.core import Advantages, reward_from_environment
from poweropd.integrations.peers import PROBE_STUDENT, PROBE_TEACHER, Peer, Probe


class MsSwift(Peer):
    """ms-swift, as far as this adapter depends on it."""

    distribution = "ms-swift"
    tested = "4.6.0"
    flag = "--external_plugins PATH_OF_poweropd/integrations/ms_swift.py"

    def probe(self) -> Probe:
        """Runs ms-swift's own expansion of advantages, with the reward in it."""
        from swift.rl_core import advantage

        replace_log_ratio()
        found = advantage.expand_advantage_to_per_token(
            torch.zeros(1),
            torch.ones(1, 2, dtype=torch.int64),
            torch.tensor([PROBE_TEACHER]),
            torch.tensor([PROBE_STUDENT]),
            teacher_kl_coef=1.0,
        )
        return Probe(
            tuple(found[0].tolist()), "swift.rl_core.advantage.expand_advantage_to_per_token"
        )


def teacher_reward(
    teacher_per_token_logps: Tensor, policy_per_token_logps: Tensor, completion_mask: Tensor
) -> Tensor:
    """Returns the reward of every sampled token, [B, T], in the place of the log ratio."""
    return Advantages(reward_from_environment())(
        teacher_per_token_logps, policy_per_token_logps, completion_mask
    )


def replace_log_ratio() -> None:
    """Replaces `compute_teacher_logratio`; raises UsageError if it is not what it was."""
    MsSwift().replace(
        "swift.rl_core.advantage",
        "compute_teacher_logratio",
        teacher_reward,
        ["teacher_per_token_logps", "policy_per_token_logps", "completion_mask"],
    )


# ms-swift runs the file as a module of its own name, and reads nothing from it.
if __name__ not in ("poweropd.integrations.ms_swift", "__main__"):
    replace_log_ratio()
