"""prime-rl: importing this puts a reward into the `ref_kl` loss of its `opd` and `opsd` algorithms.

In the trainer's TOML::

    [loss]
    type = "custom"
    import_path = "poweropd.integrations.prime_rl.loss"

The custom loss is that of the rl component, and stays prime-rl's default one; the ref_kl loss is
fixed in prime-rl, and is replaced while this is imported. Its importance ratio, its trust region
and its regularizer stay as they are.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from poweropd.integrations.core import Advantages, reward_from_environment
from poweropd.integrations.peers import PROBE_STUDENT, PROBE_TEACHER, Peer, Probe


class PrimeRL(Peer):
    """prime-rl, as far as this adapter depends on it."""

    distribution = "prime-rl"
    tested = "commit 559b447"
    flag = '[loss] type = "custom", import_path = "poweropd.integrations.prime_rl.loss"'

    def probe(self) -> Probe:
        """Runs prime-rl's own sum of losses; the gradient by ln p is minus the reward."""
        from prime_rl.trainer.rl import loss as losses

        replace_loss()
        student = torch.tensor(PROBE_STUDENT, requires_grad=True)
        total, _ = losses.compute_loss(
            trainer_logprobs=[student],
            inference_logprobs=[student.detach()],
            ref_logprobs=[torch.tensor(PROBE_TEACHER)],
            advantages=[torch.zeros(2)],
            loss_mask=[torch.ones(2, dtype=torch.bool)],
            rl_weights=[torch.zeros(2)],
            ce_weights=None,
            ref_kl_weights=[torch.ones(2)],
            rl_loss_fn=loss,
            rl_scale=1,
            ce_scale=1,
            ref_kl_scale=1,
        )
        (gradient,) = torch.autograd.grad(total, student)
        return Probe(tuple((-gradient).tolist()), "prime_rl.trainer.rl.loss.compute_loss")


def loss(inputs: Any, **options: Any) -> Any:
    """Returns prime-rl's default loss of the rl component; options are those of its config."""
    from prime_rl.configs.trainer import DefaultLossConfig
    from prime_rl.trainer.rl.loss import default_loss_fn

    return default_loss_fn(inputs, DefaultLossConfig(**options))


def with_reward(ref_kl_loss_fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns prime-rl's ref_kl loss with the reward in the place of ln t - ln p."""

    def power_ref_kl_loss_fn(inputs: Any) -> Any:
        if inputs.ref_logprobs is None:
            return ref_kl_loss_fn(inputs)  # which says what is missing
        student = inputs.trainer_logprobs.detach()
        of = Advantages(reward_from_environment())
        rewards = of(inputs.ref_logprobs, student, inputs.loss_mask)
        # The log ratio to this reference is the reward; in float64 nothing of it is rounded away.
        reference = student.double() + rewards.double()
        found = ref_kl_loss_fn(replace(inputs, ref_logprobs=reference))
        return replace(found, loss=found.loss.to(inputs.trainer_logprobs.dtype))

    return power_ref_kl_loss_fn


def replace_loss() -> None:
    """Replaces the ref_kl loss; raises UsageError if it is not what it was."""
    peer, module, name = PrimeRL(), "prime_rl.trainer.rl.loss", "ref_kl_loss_fn"
    peer.check_parameters(
        peer.attribute(module, "LossInputs"),
        ["trainer_logprobs", "inference_logprobs", "ref_logprobs"],
    )
    theirs = peer.attribute(module, name)
    if theirs.__module__ != __name__:
        peer.replace(module, name, with_reward(theirs), ["inputs"])


if find_spec("prime_rl") is not None:
    replace_loss()
