"""verl: distillation losses by the entry-point group `verl.plugins`.

`import verl` imports `verl_plugin`, which calls `register_losses`, also in every Ray worker.
The loss modes `poweropd...` are then known to verl.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poweropd.errors import RunError, UsageError, one_line
from poweropd.integrations.core import (
    Advantages,
    check_temperature,
    reward_from_environment,
    reward_metrics,
    reward_of,
)
from poweropd.integrations.peers import PROBE_STUDENT, PROBE_TEACHER, Peer, Probe
from poweropd.rewards import Reward

ALPHAS = (0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 500)
#: Loss mode -> its reward. verl's configuration has no field for a parameter, so alpha is in the
#: name; the plain name follows POWEROPD_REWARD.
MODES: dict[str, Callable[[], Reward]] = {
    "poweropd": reward_from_environment,
    **{
        f"poweropd_a{alpha:g}": partial(reward_of, {"name": "power", "alpha": float(alpha)})
        for alpha in ALPHAS
    },
    "poweropd_clip": partial(reward_of, {"name": "clip"}),
    "poweropd_tanh": partial(reward_of, {"name": "tanh"}),
    "poweropd_log_ratio": partial(reward_of, {"name": "log_ratio"}),
}

RAY_SECONDS = 240  # a Ray worker has imported verl by then
Losses = tuple[Tensor, dict[str, Any]]
logger = logging.getLogger(__name__)


class Verl(Peer):
    """verl, as far as this adapter depends on it."""

    distribution = "verl"
    tested = "0.9.1"
    flag = "distillation.distillation_loss.loss_mode=poweropd"

    def probes(self) -> dict[str, Callable[[], Probe]]:
        """Returns the probe of this process, and that of a Ray worker."""
        return {**super().probes(), "Ray worker": probe_in_ray}

    def probe(self) -> Probe:
        """Runs the registered loss through verl's registry, on verl's own data structures."""
        import verl
        from tensordict import TensorDict
        from verl.trainer.distillation.losses import get_distillation_loss_fn

        ones = torch.ones(1, 2, dtype=torch.int64)
        data = TensorDict(
            {
                "prompts": ones[:, :1],
                "responses": ones,
                "attention_mask": torch.ones(1, 3, dtype=torch.int64),
                "response_mask": ones,
                "teacher_logprobs": torch.tensor([*PROBE_TEACHER, 0.0])[:, None],
                "temperature": torch.ones(1),
            },
            batch_size=[],
        )
        loss, _ = get_distillation_loss_fn("poweropd_a5")(
            config=None,
            distillation_config=None,
            model_output={"log_probs": torch.tensor([*PROBE_STUDENT, 0.0])},
            data=data,
        )
        found = tuple((-loss[0]).tolist())
        return Probe(found, f"loss mode poweropd_a5 of verl {verl.__version__}'s registry")


def probe_in_ray() -> Probe:
    """Runs the probe in a Ray worker, which imports verl for itself; Ray gets a process to end."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        capture_output=True,
        text=True,
        check=False,
        timeout=RAY_SECONDS,
    )
    if done.returncode:
        raise RunError(f"Ray: {one_line(done.stderr.strip().rpartition(chr(10))[2])}")
    return Probe(tuple(json.loads(done.stdout.splitlines()[-1])), "loss mode poweropd_a5 in Ray")


def print_probe_in_ray() -> None:
    """Starts Ray, and prints what a worker's probe found as JSON."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # a busy machine would take its time
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    task = ray.remote(num_cpus=1)(lambda: Verl().probe().rewards)
    sys.stdout.write(json.dumps(ray.get(task.remote())) + "\n")


def register_losses() -> None:
    """Registers every loss mode with verl.

    verl hides the errors of a plugin. So they are logged and, where verl has a registry to put
    them into, raised at the first call of a loss.
    """
    verl, losses = Verl(), "verl.trainer.distillation.losses"
    try:
        register_loss = verl.attribute(losses, "register_distillation_loss")
        make_settings = verl.attribute(losses, "DistillationLossSettings")
        verl.check_parameters(register_loss, ["loss_settings"])
        verl.check_parameters(make_settings, ["_target_", "names", "use_topk", "use_estimator"])
    except UsageError as error:
        logger.error("%s", error)
        raise
    try:
        verl.check_parameters(
            verl.attribute(losses, "compute_distillation_loss_reverse_kl_estimator"),
            ["config", "distillation_config", "model_output", "data"],
        )
        verl.check_parameters(
            verl.attribute("verl.workers.utils.padding", "no_padding_2_padding"), ["tensor", "data"]
        )
        refusal = None
    except UsageError as error:
        logger.error("%s", error)
        refusal = error
    for mode, reward in MODES.items():
        loss = refused(refusal) if refusal else DistillationLoss(reward)
        register_loss(make_settings(names=mode, use_estimator=True))(loss)


def refused(error: UsageError) -> Callable[..., Losses]:
    """Returns a loss that raises an error."""

    def loss(**_: object) -> Losses:
        raise error

    return loss


class DistillationLoss:
    """Minus the reward of every sampled token, with the gradient of -sg[r] ln p.

    With `use_policy_gradient` verl takes minus the losses, without their gradient, as advantages;
    without it, it differentiates the losses themselves. Either way the student learns from r.
    """

    def __init__(self, reward: Callable[[], Reward]) -> None:
        """Takes what makes the reward; it is made at the first call, so that errors are seen."""
        self.reward = reward

    def __call__(
        self, config: Any, distillation_config: Any, model_output: Any, data: Any
    ) -> Losses:
        """Returns the losses [B, T] of the responses and metrics, as verl wants them."""
        from verl.workers.utils.padding import no_padding_2_padding

        for temperature in torch.as_tensor(data["temperature"]).flatten().unique().tolist():
            check_temperature("verl: actor_rollout_ref.rollout.temperature", temperature)
        student = no_padding_2_padding(model_output["log_probs"], data)
        teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
        mask = data["response_mask"]
        mask = mask.to_padded_tensor(False) if mask.is_nested else mask
        rewards = Advantages(self.reward())(teacher, student, mask)
        # A factor of one whose gradient is that of ln p.
        factor = (1.0 + student - student.detach()).where(mask != 0, 1.0)
        found = reward_metrics(rewards[mask != 0])
        return -rewards * factor, {f"distillation/reward/{k}": v for k, v in found.items()}


if __name__ == "__main__":
    print_probe_in_ray()
