"""The adapters inside the trainers themselves, by their own code (make integrations).

Each test skips where its trainer is not installed. What runs on which code is said in
docs/integrations.md.
"""

import importlib
import json
import os
import subprocess
import sys
import typing
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
def test_two_tokens_are_the_golden_numbers_inside_each_trainer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "skyrl" and sys.version_info < (3, 12):  # which SkyRL 0.3.0 and pydantic ask for
        monkeypatch.setattr(
            typing, "TypedDict", importlib.import_module("typing_extensions").TypedDict
        )
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
            "advantages": torch.zeros(3, 4),  # verl's own, which are computed and not used
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
    assert metrics["distillation/reward/mean"] == pytest.approx(reward[mask != 0].mean().item())


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
        "import verl\n"
        "from verl.workers.utils import padding\n"
        "padding.no_padding_2_padding = lambda values, data: values\n"
        "from poweropd.integrations import verl_plugin\n"
        "from verl.trainer.distillation.losses import get_distillation_loss_fn\n"
        "try: get_distillation_loss_fn('poweropd')(config=0, distillation_config=0,"
        " model_output=0, data=0)\n"
        "except ValueError as error: print(error)"
    )
    # The plugin comes after the change.
    said = in_python(code, VERL_USE_EXTERNAL_PLUGINS="none").splitlines()[-1]
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


# TRL

TRL_STEPS = 60


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Any]:
    """The embedded pair, loaded for TRL, and its training problems."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from poweropd import embedded
    from poweropd.embedded import task

    rows = [{"prompt": turn(p.problem)} for p in task.problems("train", 4 * TRL_STEPS)]
    return {
        "model": AutoModelForCausalLM.from_pretrained(embedded.path("student"), dtype="float32"),
        "teacher_model": AutoModelForCausalLM.from_pretrained(
            embedded.path("teacher"), dtype="float32"
        ),
        "processing_class": AutoTokenizer.from_pretrained(embedded.path("student")),
        "train_dataset": Dataset.from_list(rows),
    }


def turn(problem: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem}]


def trl_arguments(out: Path, kind: str = "DistillationConfig", **changes: Any) -> Any:
    import trl
    from trl.experimental.server_distillation import ServerDistillationConfig

    kinds = {"DistillationConfig": trl.DistillationConfig, "Server": ServerDistillationConfig}
    arguments = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 64,
        "max_steps": TRL_STEPS,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
    }
    return kinds[kind](**arguments | changes)


def our_trainer(out: Path, **overrides: Any) -> Any:
    from poweropd import Config, Trainer

    recipe = Path(__file__).parent.parent / "recipes" / "embedded.yaml"
    given = {"run.dir": out, "train.steps": TRL_STEPS, "train.schedule": "constant"}
    given |= {"train.warmup_steps": 0, "evaluate": "null", "reward.alpha": 5.0}
    return Trainer(
        Config.load(recipe, [f"{k}={v}" for k, v in (given | overrides).items()]), progress=False
    )


def padded(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


@needs["trl"]
@pytest.mark.parametrize("full_vocabulary", [False, True], ids=["sampled", "full_vocab"])
def test_trls_first_step_is_ours(
    pair: dict[str, Any], tmp_path: Path, full_vocabulary: bool
) -> None:
    from poweropd.integrations.trl import PowerOPDTrainer

    kind = "full_vocab" if full_vocabulary else "sampled"
    ours = our_trainer(tmp_path / "ours", **{"objective.kind": kind})
    examples = ours.scored(ours.sample(0))
    num_tokens = ours.updater.objective.num_tokens([e.num_tokens for e in examples])
    loss, _ = ours.updater.accumulate(examples, ours.reward, num_tokens)
    names = {id(p): name for name, p in ours.student.causal_lm.named_parameters()}
    expected = {names[id(p)]: p.grad for p in ours.student.parameters()}

    theirs = PowerOPDTrainer(args=trl_arguments(tmp_path), full_vocabulary=full_vocabulary, **pair)
    prompts = padded([e.rollout.prompt_ids for e in examples], left=True)
    completions = padded([e.rollout.completion_ids for e in examples], left=False)
    inputs = {
        **{"prompt_ids": prompts[0], "prompt_mask": prompts[1]},
        **{"completion_ids": completions[0], "completion_mask": completions[1]},
    }
    stops = torch.isin(inputs["completion_ids"], torch.tensor(theirs.eos_token_ids))
    inputs["tool_mask"] = inputs["completion_mask"] * ~stops
    assert (inputs["completion_mask"] * inputs["tool_mask"]).sum() == num_tokens
    found, _, tokens = theirs._compute_loss(theirs.model, inputs, num_tokens)
    found.backward()
    assert tokens == num_tokens
    assert found.item() == pytest.approx(loss, abs=1e-5)
    for name, parameter in theirs.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@needs["trl"]
def test_a_whole_training_by_trl_is_as_good_as_ours(pair: dict[str, Any], tmp_path: Path) -> None:
    from poweropd.integrations.trl import PowerOPDTrainer

    ours = our_trainer(tmp_path / "ours").train().final
    trainer = PowerOPDTrainer(args=trl_arguments(tmp_path / "trl"), **pair)
    trainer.train()
    trainer.save_model()
    logged = trainer.state.log_history
    assert all(-1 <= row["reward/mean"] <= 1 for row in logged if "reward/mean" in row)
    found = {name: accuracy(model) for name, model in (("ours", ours), ("trl", tmp_path / "trl"))}
    start = accuracy("embedded:student")
    assert found["trl"].mean > start.mean
    assert found["ours"].low <= found["trl"].mean <= found["ours"].high


def accuracy(model: object) -> Any:
    """Returns the accuracy of a model on 512 of the task's own problems, with its interval."""
    import poweropd

    results = poweropd.evaluate(
        str(model), ["embedded"], n=1, limit=512, max_new_tokens=64, dtype="float32"
    )
    return results["embedded"].avg_at_k


@needs["trl"]
def test_lora_and_the_command_line_of_trl(pair: dict[str, Any], tmp_path: Path) -> None:
    from poweropd import embedded

    rows = "".join(json.dumps(row) + "\n" for row in pair["train_dataset"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    arguments = {
        "model_name_or_path": embedded.path("student"),
        "teacher_model_name_or_path": embedded.path("teacher"),
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "reward": '{"name": "tanh"}',
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 16,
        **{"report_to": "none", "use_cpu": "true", "bf16": "false", "dtype": "float32"},
        **{"use_peft": "true", "lora_r": 2, "lora_target_modules": "all-linear"},
    }
    command = [f"--{name}={value}" for name, value in arguments.items()]
    done = subprocess.run(
        [sys.executable, "-m", "poweropd.integrations.trl", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'reward/mean'" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@needs["trl"]
def test_a_served_teacher_is_the_local_one(
    pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TRL's client asks for vLLM beside it, of which it needs nothing to score.
    from trl.generation import vllm_client

    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    from teacher_server import TeacherServer

    from poweropd import embedded
    from poweropd.integrations.trl import PowerOPDServerTrainer, PowerOPDTrainer

    local = PowerOPDTrainer(args=trl_arguments(tmp_path), **pair)
    inputs = local._generate_and_score_completions([pair["train_dataset"][i] for i in range(3)])
    count = int(inputs["num_items_in_batch"])
    expected = local._compute_loss(local.model, inputs, count)[0]
    with TeacherServer(embedded.path("teacher")) as server:
        arguments = trl_arguments(tmp_path, "Server", teacher_model_server_url=server.url)
        served = PowerOPDServerTrainer(
            args=arguments, **{k: v for k, v in pair.items() if k != "teacher_model"}
        )
        found = served._compute_loss(served.model, inputs, count)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@needs["trl"]
@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p", "repetition_penalty"])
def test_other_sampling_than_the_loss_knows_is_refused(
    pair: dict[str, Any], tmp_path: Path, name: str
) -> None:
    from poweropd.integrations.trl import PowerOPDTrainer

    value = 3 if name == "top_k" else 0.5
    with pytest.raises(UsageError, match=f"trl: {name}: expected .* got {value}"):
        PowerOPDTrainer(args=trl_arguments(tmp_path, **{name: value}), **pair)


@needs["trl"]
def test_a_changed_trl_is_refused(
    pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import DistillationTrainer

    from poweropd.integrations.trl import PowerOPDTrainer

    monkeypatch.setattr(DistillationTrainer, "_compute_loss", lambda self, model, batch: None)
    with pytest.raises(UsageError, match=r"takes \(self, model, batch\), .* tested with trl 1\.16"):
        PowerOPDTrainer(args=trl_arguments(tmp_path), **pair)
