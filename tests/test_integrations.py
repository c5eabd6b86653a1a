"""The adapters for other trainers without these trainers: the shared core, and what is checked.

tests/test_integrations_peers.py runs the trainers' own code (make integrations).
"""

import math
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from poweropd import rewards
from poweropd.commands import app
from poweropd.errors import RunError, UsageError
from poweropd.integrations import ms_swift, nemo_rl, prime_rl, slime
from poweropd.integrations.core import Advantages, reward_from_environment, reward_of
from poweropd.integrations.peers import (
    PEERS,
    PROBE_REWARDS,
    PROBE_STUDENT,
    PROBE_TEACHER,
    Peer,
    Probe,
)

ROOT = Path(__file__).parent.parent

TEACHER, STUDENT = torch.tensor([PROBE_TEACHER]), torch.tensor([PROBE_STUDENT])
MASK = torch.ones(1, 2, dtype=torch.int64)
LOG_PROB = st.floats(-30.0, 0.0)


def golden(values: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(values).flatten(), torch.tensor(PROBE_REWARDS))


def test_the_golden_numbers_are_the_equation() -> None:
    pairs = zip(PROBE_TEACHER, PROBE_STUDENT, strict=True)
    assert pytest.approx(PROBE_REWARDS) == [math.exp(5 * t) - math.exp(5 * p) for t, p in pairs]
    assert Probe(PROBE_REWARDS, "").is_right
    assert not Probe((*PROBE_REWARDS[:1], 0.0), "").is_right
    assert not Probe(PROBE_REWARDS[:1], "").is_right


# The core


@given(st.lists(st.tuples(LOG_PROB, LOG_PROB, st.booleans()), min_size=1, max_size=8))
def test_advantages_are_rewards_where_trained_and_zero_elsewhere(
    tokens: list[tuple[float, float, bool]],
) -> None:
    teacher, student = (torch.tensor([token[i] for token in tokens]) for i in (0, 1))
    mask = torch.tensor([token[2] for token in tokens])
    # What is not trained may hold anything.
    junk = teacher.masked_fill(~mask, torch.nan), student.masked_fill(~mask, 7.0)
    for name in ("power", "clip", "log_ratio"):
        reward = rewards.create(name)
        found = Advantages(reward)(*junk, mask)
        assert torch.equal(found, reward(teacher, student) * mask)
        assert found.dtype == torch.float32


def test_task_rewards_are_added_to_trained_tokens_only() -> None:
    of, mask = Advantages(reward_of({"name": "power"})), torch.tensor([[1, 0]])
    plain = of(TEACHER, STUDENT, mask)
    for task in (torch.tensor([2.0]), torch.tensor([[2.0, 5.0]])):
        found = of(TEACHER, STUDENT, mask, task_reward=task)
        torch.testing.assert_close(found, plain + torch.tensor([[2.0, 0.0]]))


def test_a_schedule_needs_the_step_and_follows_it() -> None:
    alpha = {"schedule": "linear", "start": 1.0, "end": 5.0, "steps": 10}
    of = Advantages(reward_of({"name": "power", "alpha": alpha}))
    with pytest.raises(UsageError, match="does not say which step"):
        of(TEACHER, STUDENT, MASK)
    golden(of(TEACHER, STUDENT, MASK, step=10))


def test_statistics_are_those_of_a_whole_step() -> None:
    reward = next(r for r in (rewards.create(n) for n in rewards.REWARDS) if r.needs_statistics)
    with pytest.raises(UsageError, match="a part of a step"):
        Advantages(reward)
    teacher, student = -torch.rand(4, 50), -torch.rand(4, 50)
    found = Advantages(reward, whole_step=True)(teacher, student, torch.ones(4, 50))
    assert abs(found.mean()) < 1e-5
    assert abs(found.std(correction=0) - 1) < 1e-4


def test_minus_infinity_is_the_rewards_affair() -> None:
    for none in (-torch.inf, -9999.0):  # as vLLM writes it
        teacher = torch.tensor([[none, -2.0]])
        found = Advantages(rewards.create("power", alpha=5.0))(teacher, STUDENT, MASK)
        assert found[0, 0] == pytest.approx(-math.exp(5 * PROBE_STUDENT[0]))
        with pytest.raises(RunError, match="LogRatio is infinite: choose a bounded reward"):
            Advantages(rewards.create("log_ratio"))(teacher, STUDENT, MASK)


@pytest.mark.parametrize("wrong", [torch.nan, 0.5, torch.inf])
def test_what_is_no_log_prob_is_refused(wrong: float) -> None:
    of, bad = Advantages(rewards.create("power")), torch.tensor([[wrong, -1.0]])
    with pytest.raises(RunError, match=r"teacher's log-probs .* at most 0, got"):
        of(bad, STUDENT, MASK)
    with pytest.raises(RunError, match=r"student's log-probs .* at most 0, got"):
        of(TEACHER, bad, MASK)
    with pytest.raises(RunError, match="student's log-probs"):
        of(TEACHER, torch.tensor([[-torch.inf, -1.0]]), MASK)


def test_rounding_above_zero_is_none() -> None:
    found = Advantages(rewards.create("power"))(torch.tensor([5e-4]), torch.zeros(1), torch.ones(1))
    assert found == 0


def test_shapes_must_be_equal() -> None:
    with pytest.raises(UsageError, match=r"of one shape, got \[1, 2\], \[2\] and \[1, 2\]"):
        Advantages(rewards.create("power"))(TEACHER, STUDENT[0], MASK)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{power", "POWEROPD_REWARD: expected JSON or a reward's name, got '{power'"),
        ("pwr", "name: expected one of log_ratio, "),
        ("[1]", "expected an object such as"),
        ('{"alpha": 5}', "expected an object such as"),
        ('{"name": "power", "alpha": -1}', "alpha: expected a number > 0, got -1"),
        ('{"name": "pwr"}', "name: expected one of log_ratio, "),
    ],
)
def test_mistakes_in_the_variable_are_one_line(
    monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("POWEROPD_REWARD", text)
    with pytest.raises(UsageError, match="POWEROPD_REWARD") as caught:
        reward_from_environment()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_an_argument_names_the_argument() -> None:
    with pytest.raises(UsageError, match=r"^reward: alpha: expected a number > 0, got -1"):
        reward_of({"name": "power", "alpha": -1})


def test_the_variable_names_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POWEROPD_REWARD", raising=False)
    assert reward_from_environment() == rewards.create("power", alpha=5.0)
    monkeypatch.setenv("POWEROPD_REWARD", '{"name": "tanh", "temperature": 2}')
    assert reward_from_environment() == rewards.create("tanh", temperature=2)
    monkeypatch.setenv("POWEROPD_REWARD", "log_ratio")
    assert reward_from_environment() == rewards.create("log_ratio")


# A trainer that changed


class Other(Peer):
    distribution = "other-trainer"
    module = "other"
    tested = "1.0"
    flag = "--other"

    def probe(self) -> Probe:
        return Probe(PROBE_REWARDS, "nothing")


def moved(losses: Tensor, weights: Tensor) -> None:
    """A function of a trainer after its signature was changed."""


def test_a_changed_signature_is_one_line_with_the_tested_version() -> None:
    Other().check_parameters(moved, ["losses"])
    with pytest.raises(UsageError) as caught:
        Other().check_parameters(moved, ["losses", "mask"])
    text = str(caught.value)
    assert "\n" not in text
    assert "moved takes (losses, weights), expected (losses, mask)" in text
    assert "tested with other-trainer 1.0" in text


def test_a_function_that_moved_is_one_line_with_the_tested_version() -> None:
    for module, name in (("argparse", "nothing"), ("no_such_module", "function")):
        with pytest.raises(UsageError, match=r"cannot be had .* tested with other-trainer 1\.0"):
            Other().attribute(module, name)


# The adapters that are plain functions


def slime_batch(**changes: Any) -> dict[str, Any]:
    batch = {"teacher_log_probs": [TEACHER[0]], "log_probs": [STUDENT[0]], "loss_masks": [MASK[0]]}
    return batch | changes


def slime_arguments(**changes: Any) -> Namespace:
    arguments = {"use_opd": True, "opd_kl_coef": 0.0, "rollout_temperature": 1.0}
    return Namespace(**{**arguments, "use_rollout_logprobs": False, **changes})


def test_slime_gets_advantages_and_returns() -> None:
    batch = slime_batch()
    slime.advantages(slime_arguments(), batch)
    golden(batch["advantages"][0])
    golden(batch["returns"][0])
    batch = slime_batch(rollout_log_probs=[STUDENT[0]], log_probs=None)
    slime.advantages(slime_arguments(use_rollout_logprobs=True), batch)
    golden(batch["advantages"][0])


@pytest.mark.parametrize(
    ("arguments", "batch", "message"),
    [
        ({"opd_kl_coef": 1.0}, {}, "expected --use-opd --opd-kl-coef 0, got use_opd=True"),
        ({"use_opd": False}, {}, "expected --use-opd"),
        ({"rollout_temperature": 0.7}, {}, "temperature 1, got 0.7"),
        ({}, {"teacher_log_probs": None}, "no 'teacher_log_probs'; poweropd was tested with slime"),
    ],
)
def test_slimes_flags_are_checked(
    arguments: dict[str, Any], batch: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        slime.advantages(slime_arguments(**arguments), slime_batch(**batch))
    assert message in str(caught.value)


def test_the_function_for_ms_swift_has_the_place_of_a_log_ratio() -> None:
    golden(ms_swift.teacher_reward(TEACHER, STUDENT, MASK))


def test_the_method_for_nemo_rl_returns_and_reports_rewards() -> None:
    reported: list[Tensor] = []
    estimator = SimpleNamespace(_compute_metrics=lambda *found: reported.extend(found))
    inputs = {"prompt_ids": None, "rewards": None, "mask": MASK}
    both: Any = {"teacher_logprobs": TEACHER, "prev_logprobs": STUDENT}
    golden(nemo_rl.compute_advantage(estimator, **inputs, **both))  # type: ignore[arg-type]
    golden(reported[1])
    with pytest.raises(UsageError, match="log-probs, got none"):
        nemo_rl.compute_advantage(estimator, **inputs)  # type: ignore[arg-type]


@dataclass
class Inputs:
    """What the loss of prime-rl is given, as far as the adapter reads it."""

    trainer_logprobs: Tensor
    ref_logprobs: Tensor | None
    loss_mask: Tensor


@dataclass
class Outputs:
    loss: Tensor
    metrics: dict[str, Tensor]


def log_ratio_loss(inputs: Inputs) -> Outputs:
    """The sampled loss of the log ratio, in the manner of prime-rl's."""
    if inputs.ref_logprobs is None:
        raise ValueError("requires ref_logprobs")
    ratio = (inputs.ref_logprobs - inputs.trainer_logprobs).detach() * inputs.loss_mask
    return Outputs(-(ratio * inputs.trainer_logprobs).sum(), {"ref_kl": ratio.mean()})


def test_the_reward_takes_the_place_of_prime_rls_log_ratio() -> None:
    student = STUDENT[0].clone().requires_grad_()
    loss = prime_rl.with_reward(log_ratio_loss)
    found = loss(Inputs(student, TEACHER[0], torch.ones(2, dtype=torch.bool)))
    assert found.loss.dtype == torch.float32
    golden(-torch.autograd.grad(found.loss, student)[0])
    with pytest.raises(ValueError, match="requires ref_logprobs"):
        loss(Inputs(student, None, torch.ones(2, dtype=torch.bool)))


# The command


def test_the_doctor_says_what_is_here_and_fails_for_what_was_asked_for() -> None:
    found = CliRunner().invoke(app, ["doctor"])
    assert "torch" in found.output
    assert "chromium" in found.output
    asked = CliRunner().invoke(app, ["doctor", "slime"])
    assert asked.exit_code == 1
    assert "! slime          not installed" in asked.output
    assert len(asked.output.splitlines()) <= 24  # one screen


def test_the_doctor_knows_no_other_trainers() -> None:
    with pytest.raises(UsageError, match="expected some of verl, trl, slime"):
        CliRunner().invoke(app, ["doctor", "verl2"], catch_exceptions=False)


@pytest.mark.parametrize(("value", "verdict"), [(PROBE_REWARDS, "right"), ((1.0, 0.0), "WRONG")])
def test_the_doctor_judges_two_tokens(
    monkeypatch: pytest.MonkeyPatch, value: tuple[float, float], verdict: str
) -> None:
    from poweropd.integrations import doctor

    module = ModuleType("pretended_peer")
    vars(module)["Other"] = type("Pretended", (Other,), {"probe": lambda _: Probe(value, "it")})
    monkeypatch.setitem(sys.modules, "pretended_peer", module)
    monkeypatch.setitem(doctor.PEERS, "pytest", "pretended_peer:Other")  # a name pip knows
    found = CliRunner().invoke(app, ["doctor", "pytest"])
    assert f"{verdict}: {value[0]:.4f}, {value[1]:.4f} by it" in found.output
    assert found.exit_code == (verdict == "WRONG")


@pytest.mark.parametrize("name", PEERS)
def test_the_docs_name_the_version_that_each_adapter_says(name: str) -> None:
    module = PEERS[name].partition(":")[0].rpartition(".")[2]
    source = (ROOT / "src/poweropd/integrations" / f"{module}.py").read_text()
    tested = re.search(r'^ *(?:tested|TESTED) = "(.+)"$', source, re.MULTILINE)
    assert tested is not None
    lines = (ROOT / "docs/integrations.md").read_text().splitlines()
    (row,) = [line for line in lines if line.lower().startswith(f"| {name} |")]
    assert row.split("|")[2].strip() == tested[1]
