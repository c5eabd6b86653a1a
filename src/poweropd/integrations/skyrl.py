"""SkyRL: its trainer with a reward where its own distillation example has the log ratio.

    python -m poweropd.integrations.skyrl trainer.algorithm.advantage_estimator=poweropd \
        trainer.ref.model.path=TEACHER ...

takes the overrides that SkyRL takes. The teacher is SkyRL's reference model.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from poweropd.integrations.core import Advantages, check_temperature, reward_from_environment
from poweropd.integrations.peers import PROBE_STUDENT, PROBE_TEACHER, Peer, Probe

ESTIMATOR = "poweropd"


class SkyRL(Peer):
    """skyrl, as far as this adapter depends on it."""

    distribution = "skyrl"
    tested = "0.3.0"
    flag = "python -m poweropd.integrations.skyrl"

    def probe(self) -> Probe:
        """Runs the trainer's method on SkyRL's own kind of batch, then its registered estimator."""
        from types import SimpleNamespace

        from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
        from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry

        register_estimator()
        algorithm = SimpleNamespace(temperature=1.0)
        this = SimpleNamespace(
            cfg=SimpleNamespace(trainer=SimpleNamespace(algorithm=algorithm)), global_step=1
        )
        batch = TrainingInputBatch(
            {
                "base_action_log_probs": torch.tensor([PROBE_TEACHER]),
                "action_log_probs": torch.tensor([PROBE_STUDENT]),
                "loss_mask": torch.ones(1, 2),
            }
        )
        batch = trainer_class().apply_reward_kl_penalty(this, batch)
        estimator = AdvantageEstimatorRegistry.get(ESTIMATOR)
        found, _ = estimator(token_level_rewards=batch["rewards"])
        return Probe(
            tuple(found[0].tolist()), "RayPPOTrainer.apply_reward_kl_penalty and its registry"
        )


def advantages_are_rewards(token_level_rewards: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    """Returns rewards [B, T] as advantages and as returns: a dense reward needs no estimate."""
    return token_level_rewards, token_level_rewards


def register_estimator() -> None:
    """Registers the advantage estimator `poweropd` in this process, once."""
    peer, module = SkyRL(), "skyrl.backends.skyrl_train.utils.ppo_utils"
    register = peer.attribute(module, "register_advantage_estimator")
    registry: Any = peer.attribute(module, "AdvantageEstimatorRegistry")
    peer.check_parameters(register, ["name"])
    if ESTIMATOR not in registry.list_available():
        register(ESTIMATOR)(advantages_are_rewards)


def trainer_class() -> Any:
    """Returns SkyRL's trainer with the reward; raises UsageError if it is not what it was."""
    trainer: Any = SkyRL().attribute("skyrl.train.trainer", "RayPPOTrainer")
    SkyRL().check_parameters(trainer.apply_reward_kl_penalty, ["self", "data"])

    class PowerOPDTrainer(trainer):
        """RayPPOTrainer whose rewards are those of the teacher's and the student's log-probs."""

        def apply_reward_kl_penalty(self, data: Any) -> Any:
            algorithm = self.cfg.trainer.algorithm
            check_temperature("skyrl: generator.sampling_params.temperature", algorithm.temperature)
            of = Advantages(reward_from_environment(), whole_step=True)
            teacher, student = data["base_action_log_probs"], data["action_log_probs"]
            data["rewards"] = of(teacher, student, data["loss_mask"], step=self.global_step - 1)
            return data

    return PowerOPDTrainer


def run(overrides: list[str]) -> None:
    """Trains as SkyRL does, in a Ray task of its own."""
    import ray
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.entrypoints.main_base import BasePPOExp, validate_cfg
    from skyrl.train.utils import initialize_ray

    register_estimator()
    trainer_class()  # before anything is started
    config = SkyRLTrainConfig.from_cli_overrides(overrides)
    validate_cfg(config)
    initialize_ray(config)

    @ray.remote(num_cpus=1)
    def experiment() -> None:
        register_estimator()

        class Experiment(BasePPOExp):
            def get_trainer(self, *args: Any, **kwargs: Any) -> Any:
                return trainer_class()(*args, **kwargs)

        Experiment(config).run()

    ray.get(experiment.remote())


if __name__ == "__main__":
    run(sys.argv[1:])
