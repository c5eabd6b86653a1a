"""Agreement with golden numbers of the paper authors' functions, where that file is at hand.

Looked for in the folder POWEROPD_REFERENCE, or in ../shared/reference beside the checkout.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rollout_cases import make_rollout
from torch import Tensor

from poweropd import rewards
from poweropd.data.batch import collate
from poweropd.data.rollout import Example, make_examples
from poweropd.kernels import Head, linear_log_prob
from poweropd.objectives.base import TokenRecord
from poweropd.objectives.sampled import Sampled

FOLDER = os.environ.get("POWEROPD_REFERENCE", Path(__file__).parents[2] / "shared" / "reference")
PATH = Path(FOLDER) / "golden.npz"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason=f"golden numbers not at hand: {PATH}")

POLICIES = {"raw": "raw", "mask": "mask", "im_end": "canonical", "cross_eos": "cross"}
END_OF_TEXT, TURN_END, PROMPT = 21, 22, 3
WINDOW = 4  # micro-batches of one optimizer step
NAMED = {
    "log_ratio": rewards.LogRatio(),
    "log_clip": rewards.Clip(-5.0, 5.0),
    "log_tanh": rewards.Tanh(5.0),
    "prob_diff": rewards.Power(1.0),
    "sqrt_diff": rewards.Power(0.5),
}
# (absolute error of rewards, relative error of gradients): the golden numbers' own distance to a
# float64 closed form. They raise probabilities to powers in float32, which costs at large alpha.
TOLERANCES = {
    **{"log_ratio": (3.2e-6, 1e-6), "log_clip": (1e-6, 1e-6), "log_tanh": (3e-7, 1e-6)},
    **{"power_diff_a50": (1.2e-6, 3e-3), "power_diff_a500": (1.2e-5, 3e-3)},
}
DEFAULT_TOLERANCE = (3e-7, 2e-6)


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Any]:
    return dict(np.load(PATH))


def examples_of(golden: Mapping[str, Any], window: int, policy: str) -> list[Example]:
    ids, labels = golden["input_ids"][window], golden["labels"][window]
    rollouts = [
        make_rollout(row, ids[row, :PROMPT].tolist(), ids[row][labels[row] != -100].tolist())
        for row in range(len(ids))
    ]
    return make_examples(rollouts, [END_OF_TEXT, TURN_END], [TURN_END], policy)


class Window:
    """A micro-batch through the whole update path; its logits act as hidden states of an
    identity head, so that gradients in hidden states are gradients in logits."""

    def __init__(self, golden: Mapping[str, Any], window: int, policy: str) -> None:
        self.examples = examples_of(golden, window, policy)
        self.leaf = torch.tensor(golden["student_logits"][window]).requires_grad_()
        self.head = Head(torch.eye(self.leaf.shape[-1]))
        self.batch = collate(self.examples)
        self.hidden = self._states(self.leaf)
        teacher = self._states(torch.tensor(golden["teacher_logits"][window]))
        log_probs = linear_log_prob(teacher, self.head.weight, self.batch.teacher.targets)
        self.batch = replace(self.batch, teacher_log_probs=log_probs)

    def _states(self, logits: Tensor) -> Tensor:
        if not self.examples:
            return logits.flatten(0, 1)[:0]
        rows = [e.rollout.request.prompt_index for e in self.examples]
        width = self.batch.student.input_ids.shape[1]
        return logits[rows, :width].flatten(0, 1)[self.batch.student.index]

    def run(self, reward: rewards.Reward, token_weight: float) -> tuple[Tensor, TokenRecord]:
        return Sampled()(self.hidden, self.head, self.batch, reward, token_weight)


def reward_of(spec: str, alpha: float) -> rewards.Reward:
    return NAMED.get(spec) or rewards.Power(round(float(alpha), 4))


@pytest.mark.parametrize("norm", ["none", "zscore"])
@pytest.mark.parametrize("terminal", POLICIES)
def test_rewards_losses_and_gradients(golden: Mapping[str, Any], terminal: str, norm: str) -> None:
    names = {key: golden[key].tolist() for key in ("terminals", "token_norms", "reward_norms")}
    at = (names["terminals"].index(terminal), slice(None))
    kind = (names["token_norms"].index("window_token_mean"), names["reward_norms"].index(norm))
    for number, spec in enumerate(golden["specs"].tolist()):
        windows = [Window(golden, w, POLICIES[terminal]) for w in range(WINDOW)]
        reward = reward_of(spec, golden["spec_alpha"][number])
        num_tokens = sum(len(w.batch.positions) for w in windows)
        if norm == "zscore":
            raw = torch.cat([w.run(reward, 0.0)[1].rewards for w in windows]).double()
            statistics = raw.mean().item(), raw.std(correction=0).item()
            reward = rewards.ZScore(reward).with_statistics(*statistics)
        scale = 1.0 if norm == "none" else 1.0 / statistics[1]
        absolute, relative = TOLERANCES.get(spec, DEFAULT_TOLERANCE)
        expected_rewards = golden["reward_used"][at[0], number, kind[0], kind[1]]
        expected_losses = golden["loss"][at[0], number, kind[0], kind[1]]
        expected_gradients = golden["grad"][at[0], number, kind[0], kind[1]]
        for w, window in enumerate(windows):
            # The golden loss is scaled by the micro-batches, which a trainer divides by later.
            loss, record = window.run(reward, WINDOW / num_tokens)
            (gradient,) = torch.autograd.grad(loss, window.leaf)
            mask = golden["comp_effective_mask"][at[0], w]
            expected = torch.tensor(expected_rewards[w][mask])
            assert torch.allclose(record.rewards, expected, rtol=1e-6, atol=4 * absolute * scale)
            assert loss.item() == pytest.approx(expected_losses[w], rel=1e-4, abs=1e-5)
            wanted = torch.tensor(expected_gradients[w])
            error = (gradient[:, PROMPT - 1 : -1] - wanted).norm()
            assert error <= 4 * relative * wanted.norm() + 1e-7
