"""The adapters inside the trainers themselves, by their own code (make integrations).

Each test skips where its trainer is not installed. What runs on which code is said in
docs/integrations.md.
"""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from poweropd import rewards
from poweropd.errors import UsageError
from poweropd.integrations.peers import PEERS, find_peer

pytestmark = [
    pytest.mark.integrations,
    # The trainers' own code warns of what it will change; that is not ours to mend.
    pytest.mark.filterwarnings("ignore"),
]
MODULES = {
    "verl": "verl",
    "trl": "trl",
    "slime": "slime",
    "ms-swift": "swift",
    "nemo-rl": "nemo_rl",
    "prime-rl": "prime_rl",
    "skyrl": "skyrl",
}
needs = {
    name: pytest.mark.skipif(find_spec(module) is None, reason=f"{name} is not installed")
    for name, module in MODULES.items()
}
RECIPES = Path(__file__).parent.parent / "recipes" / "integrations"


def in_python(code: str, **environment: str) -> str:
    """Runs code in a process of its own, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs[name]) for name in PEERS])
def test_two_tokens_are_the_golden_numbers_inside_each_trainer(name: str) -> None:
    assert find_peer(name).probe().is_right


# verl

SEED = 3


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    """Three responses of four tokens with prompts of two; the last ones are padding."""
    generator = torch.Generator().manual_seed(SEED)
    log_probs = -4 * torch.rand(2, 3, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    return {"teacher": log_probs[0], "student": log_probs[1], "mask": mask}


def flat(values: Tensor, mask: Tensor) -> Tensor:
    """Lays responses out as verl's engines do: unpadded, and shifted by one token to the left."""
    parts = []
    for row, kept in zip(values, mask.bool(), strict=True):
        parts += [torch.zeros(1), row[kept], torch.zeros(1)]  # the first token of two of the prompt
    return torch.cat(parts)


def verl_batch(tokens: dict[str, Tensor], temperature: float = 1.0) -> Any:
    from tensordict import TensorDict

    mask = tokens["mask"]
    prompts = torch.ones(3, 2, dtype=torch.int64)
    return TensorDict(
        {
            "prompts": prompts,
            "responses": torch.ones(3, 4, dtype=torch.int64),
            "attention_mask": torch.cat([prompts, mask], dim=1),
            "response_mask": mask,
            "old_log_probs": tokens["student"],
            "teacher_logprobs": flat(tokens["teacher"], mask)[:, None],
            "temperature": torch.full((3,), temperature),
            "dp_size": 1,
            "batch_num_tokens": int(mask.sum()),
            "global_batch_size": 3,
        },
        batch_size=[],
    )


def verl_configs(loss_mode: str, policy_gradient: bool) -> tuple[Any, Any]:
    from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig

    actor = FSDPActorConfig(rollout_n=1, use_dynamic_bsz=True)
    loss = DistillationLossConfig(
        loss_mode=loss_mode,
        use_task_rewards=False,
        use_policy_gradient=policy_gradient,
        loss_max_clamp=None,
    )
    return actor, DistillationConfig(distillation_loss=loss)


VERL_MODES = {
    "poweropd": rewards.create("power", alpha=5.0),
    "poweropd_a0.5": rewards.create("power", alpha=0.5),
    "poweropd_a500": rewards.create("power", alpha=500.0),
    "poweropd_clip": rewards.create("clip"),
    "poweropd_tanh": rewards.create("tanh"),
    "poweropd_log_ratio": rewards.create("log_ratio"),
}


@needs["verl"]
@pytest.mark.parametrize("policy_gradient", [True, False], ids=["advantages", "supervised"])
@pytest.mark.parametrize("mode", VERL_MODES)
def test_verls_own_loss_has_the_gradient_of_our_objective(
    tokens: dict[str, Tensor], mode: str, policy_gradient: bool
) -> None:
    from verl.trainer.distillation.losses import distillation_ppo_loss

    mask = tokens["mask"]
    student = flat(tokens["student"], mask).requires_grad_()
    actor, distillation = verl_configs(mode, policy_gradient)
    loss, metrics = distillation_ppo_loss(
        actor, distillation, {"log_probs": student}, verl_batch(tokens)
    )
    (found,) = torch.autograd.grad(loss, student)

    own = tokens["student"].clone().requires_grad_()
    reward = VERL_MODES[mode](tokens["teacher"], own)
    ours = -(reward * own * mask).sum() / mask.sum()
    (expected,) = torch.autograd.grad(ours, own)
    torch.testing.assert_close(found, flat(expected, mask), rtol=0, atol=1e-6)
    assert metrics["distillation/reward"] == pytest.approx(reward[mask != 0].mean().item())


@needs["verl"]
def test_another_temperature_is_refused(tokens: dict[str, Tensor]) -> None:
    from verl.trainer.distillation.losses import distillation_loss

    student = flat(tokens["student"], tokens["mask"])
    with pytest.raises(UsageError, match=r"rollout\.temperature: expected .* got 0\.6"):
        distillation_loss(
            *verl_configs("poweropd", True), {"log_probs": student}, verl_batch(tokens, 0.6)
        )


@needs["verl"]
def test_importing_verl_registers_the_losses_and_the_variable_names_the_reward() -> None:
    listing = (
        "import verl, json\n"
        "from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY as registry\n"
        "print(json.dumps({k: repr(v.reward()) for k, v in registry.items() if 'power' in k}))"
    )
    variable = '{"name": "power", "alpha": 10}'
    found = json.loads(in_python(listing, POWEROPD_REWARD=variable).splitlines()[-1])
    assert found["poweropd"] == repr(rewards.create("power", alpha=10))
    assert found["poweropd_a0.5"] == repr(VERL_MODES["poweropd_a0.5"])
    assert set(VERL_MODES) < set(found)


@needs["verl"]
def test_a_ray_worker_has_them_too() -> None:
    from poweropd.integrations.verl import probe_in_ray

    assert probe_in_ray().is_right


@needs["verl"]
def test_a_changed_verl_trains_nothing_and_says_why(tokens: dict[str, Tensor]) -> None:
    code = (
        "import importlib.metadata as m; m.entry_points = lambda **_: ()\n"  # not yet the plugin
        "import verl\n"
        "from verl.workers.utils import padding\n"
        "padding.no_padding_2_padding = lambda values, data: values\n"
        "from poweropd.integrations import verl_plugin\n"
        "from verl.trainer.distillation.losses import get_distillation_loss_fn\n"
        "try: get_distillation_loss_fn('poweropd')(config=0, distillation_config=0,"
        " model_output=0, data=0)\n"
        "except ValueError as error: print(error)"
    )
    said = in_python(code).splitlines()[-1]
    assert "takes (values, data), expected (tensor, data)" in said
    assert "poweropd was tested with verl 0.9.1" in said


@needs["verl"]
@pytest.mark.parametrize("script", ["verl-one-node.sh", "verl-many-nodes.sh"])
def test_verl_understands_the_overrides_of_the_recipes(script: str, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    # The script's own last line runs `python -m verl...`: this stands in its place.
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nshift 2\nfor x in "$@"; do printf "%s\\n" "$x"; done\n')
    fake.chmod(0o755)
    environment = {"TRAIN": "a.parquet", "TEST": "b.parquet"} | {
        "POWEROPD_REWARD": '{"name": "power", "alpha": 10}',
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    printed = subprocess.run(
        [RECIPES / script], env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", printed.splitlines())
    assert config.actor_rollout_ref.rollout.temperature == 1
    loss = omega_conf_to_dataclass(config.distillation.distillation_loss)
    assert (loss.loss_mode, loss.use_policy_gradient) == ("poweropd", True)
    if script == "verl-many-nodes.sh":
        variables = config.ray_kwargs.ray_init.runtime_env.env_vars
        assert json.loads(variables.POWEROPD_REWARD) == {"name": "power", "alpha": 10}


# ms-swift


@needs["ms-swift"]
def test_ms_swift_imports_the_plugin_as_it_imports_any() -> None:
    advantage = importlib.import_module("swift.rl_core.advantage")
    from swift.utils.utils import import_external_file

    from poweropd.integrations import ms_swift

    import_external_file(ms_swift.__file__)
    assert advantage.compute_teacher_logratio.__name__ == "teacher_reward"
