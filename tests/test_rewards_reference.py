"""Rewards with a reference model: equations, properties, and what they descend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poweropd import rewards

LOG_PROB = st.one_of(st.floats(-50.0, 0.0), st.floats(-1e-3, 0.0), st.just(0.0))
FACTOR = st.sampled_from([0.25, 1.0, 1.25, 3.0])


def value(base: rewards.Reward, factor: float, t: float, q: float, p: float) -> float:
    reward = rewards.Extrapolate(base, factor).with_reference(torch.tensor([q]))
    return reward(torch.tensor([t]), torch.tensor([p])).item()


@given(LOG_PROB, LOG_PROB, LOG_PROB, FACTOR)
@settings(max_examples=50)
def test_of_the_log_ratio_it_is_the_published_equation(
    t: float, q: float, p: float, factor: float
) -> None:
    """The KL to the reference, and factor times the reward ln t - ln q (arXiv:2602.12125)."""
    t, q, p = (torch.tensor(x).item() for x in (t, q, p))
    expected = factor * (t - q) - (p - q)
    assert value(rewards.LogRatio(), factor, t, q, p) == pytest.approx(expected, abs=2e-5)


def test_golden_numbers() -> None:
    """t, q, p of 0.6, 0.5, 0.3 and a factor of 1.25, by hand."""
    t, q, p = (math.log(x) for x in (0.6, 0.5, 0.3))
    assert value(rewards.Power(1.0), 1.25, t, q, p) == pytest.approx(0.325)
    assert value(rewards.Power(2.0), 1.25, t, q, p) == pytest.approx(0.2975)
    assert value(rewards.LogRatio(), 1.25, t, q, p) == pytest.approx(0.738727569)
    assert value(rewards.Clip(-0.5, 0.5), 1.25, t, q, p) == pytest.approx(0.5)


@given(LOG_PROB, LOG_PROB, LOG_PROB, FACTOR, st.sampled_from(["power", "clip", "tanh", "sign"]))
@settings(max_examples=50)
def test_it_is_as_bounded_as_its_base_and_is_the_base_where_models_agree(
    t: float, q: float, p: float, factor: float, name: str
) -> None:
    base = rewards.create(name)
    assert abs(value(base, factor, t, q, p)) <= factor + abs(1 - factor) + 1e-6
    plain = base(torch.tensor([t]), torch.tensor([p])).item()
    assert value(base, factor, t, t, p) == pytest.approx(plain, abs=1e-6)
    assert value(base, 1.0, t, q, p) == plain
    assert value(base, factor, t, p, p) == pytest.approx(factor * plain, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "bounded"), [("power", True), ("tanh", True), ("log_ratio", False)]
)
def test_it_is_bounded_and_does_not_keep_the_sign(name: str, bounded: bool) -> None:
    """P1 is the base's, up to a factor; P2 is given up: it also looks where the reference is."""
    reward = rewards.create("extrapolate", base={"name": name}, factor=2.0)
    found = rewards.check(reward.with_reference(torch.tensor(math.log(0.3))))
    assert found.bounded == bounded
    assert not found.sign_consistent
    if bounded:
        assert found.bound <= 3


BASES = [rewards.LogRatio(), rewards.Power(2.0), rewards.Power(0.5), rewards.JensenShannon(0.3)]


@pytest.mark.parametrize("base", BASES, ids=repr)
@pytest.mark.parametrize("factor", [0.5, 1.25])
def test_the_expected_gradient_is_that_of_two_divergences(
    base: rewards.Reward, factor: float
) -> None:
    """By enumeration of a vocabulary of 50, in float64: factor D(t, p) + (1 - factor) D(q, p)."""
    torch.manual_seed(0)
    t, q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    p = logits.log_softmax(-1)
    reward = rewards.Extrapolate(base, factor).with_reference(q)
    weights = (p.exp() * reward.compute(t, p)).detach()
    (policy,) = torch.autograd.grad(-(weights * p).sum(), logits, retain_graph=True)
    exact = torch.zeros_like(logits)
    for share, other in ((factor, t), (1 - factor, q)):
        own = -(p.exp().detach() * base.compute(other, p).detach() * p).sum()
        exact += share * torch.autograd.grad(own, logits, retain_graph=True)[0]
    torch.testing.assert_close(policy, exact, rtol=1e-9, atol=1e-12)
    divergence = factor * base.divergence(t, p) + (1 - factor) * base.divergence(q, p)
    torch.testing.assert_close(reward.divergence(t, p), divergence)


@pytest.mark.parametrize(("base", "alpha"), [(rewards.LogRatio(), None), (rewards.Power(1.0), 1.0)])
def test_where_it_comes_to_rest(base: rewards.Reward, alpha: float | None) -> None:
    """At p ~ t^f q^(1 - f) for the log ratio; at f t + (1 - f) q for power with alpha 1."""
    torch.manual_seed(1)
    q = torch.randn(50, dtype=torch.float64).log_softmax(-1)
    t = (q + 0.1 * torch.randn(50, dtype=torch.float64)).log_softmax(-1)
    mixed = 1.25 * t - 0.25 * q if alpha is None else (1.25 * t.exp() - 0.25 * q.exp()).log()
    p = mixed.log_softmax(-1)
    r = rewards.Extrapolate(base, 1.25).with_reference(q).compute(t, p)
    torch.testing.assert_close(r, (p.exp() * r).sum().expand(50), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(p, t, atol=1e-3)


def test_a_reference_reaches_the_base_of_other_rewards() -> None:
    t, p, q = -torch.rand(3, 20)
    inner = rewards.Extrapolate(rewards.LogRatio(), 1.5)
    expected = inner.with_reference(q)(t, p)
    score = rewards.create("zscore", base={"name": "extrapolate", "factor": 1.5})
    assert score.needs_reference
    assert score.needs_statistics
    mean, std = expected.mean().item(), expected.std(correction=0).item()
    known = score.with_statistics(mean, std)
    assert known.needs_reference
    torch.testing.assert_close(known.with_reference(q)(t, p), (expected - mean) / std)
    trusted = rewards.Trust(inner, 0.2)
    assert trusted.needs_reference
    far = (t - p).abs() > 0.2
    assert torch.equal(trusted.with_reference(q)(t, p), expected.masked_fill(far, 0.0))
    plain = rewards.Power()
    assert not plain.needs_reference
    assert plain.with_reference(q) is plain


def test_without_a_reference_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="call with_reference"):
        rewards.create("extrapolate")(torch.zeros(1), torch.zeros(1))


def test_a_token_that_the_reference_excludes_has_a_bounded_reward() -> None:
    impossible = torch.tensor([-math.inf])
    t, p = torch.tensor([-0.5]), torch.tensor([-1.0])
    reward = rewards.Extrapolate(rewards.Power(1.0), 1.25).with_reference(impossible)
    expected = 1.25 * (math.exp(-0.5) - math.exp(-1)) + 0.25 * math.exp(-1)
    assert reward(t, p).item() == pytest.approx(expected)
    plain = rewards.Extrapolate(rewards.LogRatio(), 1.0).with_reference(impossible)
    assert plain(t, p).item() == 0.5


def test_its_parameters_are_scheduled_and_checked() -> None:
    schedule = {"schedule": "linear", "start": 1.0, "end": 2.0, "steps": 4}
    reward = rewards.create("extrapolate", factor=schedule, base={"name": "power", "alpha": 2.0})
    assert reward.at(2) == rewards.Extrapolate(rewards.Power(2.0), 1.5)
    for parameters, message in (
        ({"factor": 0}, "factor: expected a number > 0, got 0"),
        ({"base": {"name": "zscore"}}, "base: expected a reward other than zscore"),
        ({"base": {"name": "extrapolate"}}, "base: expected a reward without a reference"),
    ):
        with pytest.raises(ValueError, match=message):
            rewards.create("extrapolate", **parameters)
