"""Rewards: their properties, their accuracy against float64, and bad parameters."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poweropd import rewards

LOG_PROB = st.one_of(
    st.floats(-1e4, 0.0), st.floats(-20.0, 0.0), st.floats(-1e-3, 0.0), st.just(0.0)
)
ALPHA = st.sampled_from([0.1, 0.5, 1.0, 5.0, 50.0, 500.0])
BOUNDED = {
    **{"clip": 1.0, "tanh": 1.0, "power": 1.0, "hellinger": 10.0, "gate": 1.0},
    **{"tsallis": 10.0, "sign": 1.0, "suppress": 1.0, "trust": 2.0},
}
UNBOUNDED = ["log_ratio", "proximal", "jensen_shannon"]
SIGN_CONSISTENT = [
    *("log_ratio", "clip", "tanh", "power", "hellinger"),
    *("tsallis", "proximal", "jensen_shannon", "sign"),
]


def pair(t: float, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([t], dtype=torch.float32), torch.tensor([p], dtype=torch.float32)


@given(LOG_PROB, LOG_PROB, st.sampled_from(sorted(BOUNDED)))
def test_bounded_rewards_stay_within_their_bound(t: float, p: float, name: str) -> None:
    assert rewards.create(name)(*pair(t, p)).abs().item() <= BOUNDED[name]


@given(LOG_PROB, LOG_PROB, st.sampled_from(SIGN_CONSISTENT))
def test_the_sign_is_that_of_the_log_ratio(t: float, p: float, name: str) -> None:
    teacher, student = pair(t, p)
    reward = rewards.create(name)(teacher, student)
    assert reward.sign() * (teacher - student).sign() >= 0  # 0 where a tiny value underflows
    if teacher == student:
        assert reward == 0


@given(LOG_PROB, LOG_PROB, ALPHA)
def test_power_agrees_with_float64(t: float, p: float, alpha: float) -> None:
    teacher, student = pair(t, p)
    t64, p64 = teacher.item(), student.item()  # float32 values, exact as float64
    largest = max(t64, p64)
    exact = (
        math.copysign(1, t64 - p64)
        * math.exp(alpha * largest)
        * -math.expm1(-alpha * abs(t64 - p64))
    )
    error = abs(rewards.create("power", alpha=alpha)(teacher, student).item() - exact)
    assert error <= 3e-7
    if abs(exact) > 1e-37:  # float32's normal numbers
        assert error <= 1e-6 * (1 + alpha * abs(largest)) * abs(exact)


@given(LOG_PROB, LOG_PROB)
def test_power_is_the_plain_formula_where_that_is_accurate(t: float, p: float) -> None:
    got = rewards.create("power", alpha=5)(*(x.double() for x in pair(t, p)))
    t32, p32 = (x.double() for x in pair(t, p))
    assert torch.allclose(got.double(), (5 * t32).exp() - (5 * p32).exp(), atol=1e-7)


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_box_cox_tends_to_the_log_ratio(t: float, p: float) -> None:
    box_cox = rewards.create("power", alpha=1e-6, scale="box_cox")(*pair(t, p))
    assert torch.allclose(box_cox, rewards.create("log_ratio")(*pair(t, p)), rtol=1e-4, atol=1e-7)


@given(st.floats(-5.0, 0.0), st.floats(-5.0, 0.0), st.sampled_from([0.5, 10.0]))
def test_hellinger_is_the_plain_formula_up_to_its_cap(t: float, p: float, cap: float) -> None:
    expected = min(2 * (math.sqrt(math.exp(t) / math.exp(p)) - 1), cap)
    assert rewards.Hellinger(cap)(*pair(t, p)).item() == pytest.approx(expected, abs=1e-5)


@given(LOG_PROB, LOG_PROB, st.sampled_from([0.01, 0.3, 0.5, 0.99, 1.0]))
def test_the_proximal_reward_agrees_with_float64(t: float, p: float, share: float) -> None:
    """Computed as ln((a e^t + (1 - a) e^p) / e^p), with both scaled by the larger one."""
    teacher, student = (x.item() for x in pair(t, p))
    largest = max(teacher, student)
    mixture = share * math.exp(teacher - largest) + (1 - share) * math.exp(student - largest)
    got = rewards.Proximal(share)(*pair(t, p)).item()
    if mixture > 0:
        exact = math.log(mixture) + largest - student
        assert got == pytest.approx(exact, rel=2e-6, abs=2e-7)
    else:  # a = 1, and the teacher's share is beyond float64
        assert got == pytest.approx(teacher - student)
    assert got >= (math.log1p(-share) if share < 1 else -math.inf) - 1e-6
    if share < 1:
        half = rewards.JensenShannon(share)(*pair(t, p)).item()
        assert half == pytest.approx((1 - share) * got, rel=1e-6)


@given(st.floats(-6.0, 0.0), st.floats(-6.0, 0.0), st.sampled_from([0.1, 0.5, 0.999, 1.0, 2.0]))
def test_tsallis_is_the_plain_formula_up_to_its_cap(t: float, p: float, q: float) -> None:
    plain = t - p if q == 1 else (1 - (math.exp(p) / math.exp(t)) ** (q - 1)) / (q - 1)
    got = rewards.Tsallis(q, cap=4.0)(*pair(t, p)).item()
    assert got == pytest.approx(min(max(plain, -4.0), 4.0), rel=1e-4, abs=2e-5)


@given(LOG_PROB, LOG_PROB)
def test_rewards_that_are_others_for_a_value_of_their_parameter(t: float, p: float) -> None:
    for name, parameters, other in [
        ("tsallis", {"q": 0.5}, rewards.Hellinger()),
        ("tsallis", {"q": 1.0, "cap": 1.0}, rewards.Clip()),
        ("tsallis", {"q": 1 + 2e-6, "cap": 1.0}, rewards.Clip()),
        ("proximal", {"share": 1.0}, rewards.LogRatio()),
    ]:
        found = rewards.create(name, **parameters)(*pair(t, p))
        torch.testing.assert_close(found, other(*pair(t, p)), rtol=1e-4, atol=1e-6)


def test_trust_leaves_out_what_is_beyond_its_bound() -> None:
    t, p = torch.tensor([-1.0, -5.0, -1.0, -math.inf]), torch.tensor([-1.5, -1.0, -6.0, -1.0])
    assert rewards.create("trust", bound=1.0)(t, p).tolist() == [0.5, 0, 0, 0]
    base = {"name": "power", "alpha": {"schedule": "linear", "start": 1, "end": 3, "steps": 2}}
    bound = {"schedule": "linear", "start": 4.0, "end": 0.5, "steps": 2}
    reward = rewards.create("trust", base=base, bound=bound)
    assert reward.at(0) == rewards.Trust(rewards.Power(1.0), 4.0)
    assert reward.at(2) == rewards.Trust(rewards.Power(3.0), 0.5)
    assert reward.at(0)(t, p).tolist()[1] == rewards.Power(1.0)(t, p).tolist()[1]


def test_controls_and_signs() -> None:
    t, p = torch.tensor([0.9, 0.1, 0.5]).log(), torch.tensor([0.05, 0.6, 0.5]).log()
    assert rewards.create("sign")(t, p).tolist() == [1, -1, 0]
    assert rewards.create("suppress")(t, p).tolist() == [-1, 0, 0]
    assert rewards.create("suppress", threshold=0.55)(t, p).tolist() == [-1, 0, -1]


@given(LOG_PROB, LOG_PROB)
def test_tanh_is_a_ratio_of_powers(t: float, p: float) -> None:
    teacher, student = (x.double() for x in pair(t, p))
    a = 2 / 5
    shift = torch.maximum(teacher, student)
    powers = ((teacher - shift) * a).exp(), ((student - shift) * a).exp()
    expected = (powers[0] - powers[1]) / (powers[0] + powers[1])
    assert torch.allclose(rewards.create("tanh")(teacher, student).double(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [n for n in rewards.REWARDS if n not in ("zscore", "extrapolate")])
def test_any_shape_and_dtype_gives_float32_without_gradient(name: str, dtype: torch.dtype) -> None:
    log_probs = -torch.rand(2, 3, 4).to(dtype)
    student = log_probs.clone().requires_grad_()
    reward = rewards.create(name)(log_probs, student)
    assert reward.dtype == torch.float32
    assert reward.shape == (2, 3, 4)
    assert not reward.requires_grad


def test_low_precision_inputs_are_not_raised_to_a_power_in_low_precision() -> None:
    teacher, student = torch.tensor([-0.010]).bfloat16(), torch.tensor([-0.011]).bfloat16()
    exact = math.exp(500 * teacher.item()) - math.exp(500 * student.item())
    got = rewards.create("power", alpha=500)(teacher, student).item()
    assert got == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", sorted(BOUNDED))
def test_a_teacher_that_excludes_the_token_is_legal_where_the_reward_is_bounded(name: str) -> None:
    reward = rewards.create(name)(torch.tensor([-math.inf]), torch.tensor([-0.5]))
    assert reward.isfinite().all()
    assert reward.item() <= 0


def test_equal_log_probs_give_zero_even_at_minus_infinity() -> None:
    nothing = torch.tensor([-math.inf, -math.inf])
    for name in SIGN_CONSISTENT:
        assert rewards.create(name)(nothing, nothing).tolist() == [0.0, 0.0]


def test_the_log_ratio_is_zero_where_both_log_probs_are_minus_infinity() -> None:
    t = torch.tensor([-math.inf, -math.inf, -1.0, -1.0, -0.5])
    p = torch.tensor([-math.inf, -2.0, -math.inf, -1.0, -2.0])
    assert rewards.log_ratio(t, p).tolist() == [0.0, -math.inf, math.inf, 0.0, 1.5]


def test_zscore_needs_statistics_and_then_standardizes() -> None:
    teacher, student = -torch.rand(100), -torch.rand(100)
    reward = rewards.create("zscore")
    assert reward.needs_statistics
    with pytest.raises(ValueError, match="with_statistics"):
        reward(teacher, student)
    raw = reward.unstandardized(teacher, student)
    known = reward.with_statistics(raw.mean().item(), raw.std(correction=0).item())
    assert not known.needs_statistics
    scores = known(teacher, student)
    assert scores.mean().item() == pytest.approx(0, abs=1e-6)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_zscore_of_a_constant_is_zero() -> None:
    known = rewards.create("zscore").with_statistics(1.0, 0.0)
    assert known(torch.tensor([-1.0]), torch.tensor([-2.0])).item() == 0


def test_zscore_of_another_reward() -> None:
    reward = rewards.create("zscore", base={"name": "power", "alpha": 2.0})
    assert reward.unstandardized == rewards.Power(alpha=2.0)


def test_schedules_are_resolved_by_step() -> None:
    schedule = {"schedule": "linear", "start": 1.0, "end": 5.0, "steps": 4}
    reward = rewards.create("power", alpha=schedule)
    assert [reward.at(step).alpha for step in (0, 1, 4, 9)] == [1.0, 2.0, 5.0, 5.0]
    cosine = rewards.Schedule("cosine", 0.0, 1.0, 10)
    assert cosine.at(5) == pytest.approx(0.5)
    assert cosine.at(1) < 0.1
    assert rewards.Schedule("constant", 3.0).at(7) == 3.0
    with pytest.raises(ValueError, match=r"reward\.at\(step\)"):
        reward(torch.zeros(1), torch.zeros(1))


def test_check_finds_what_each_reward_is() -> None:
    for name in SIGN_CONSISTENT:
        assert rewards.check(rewards.create(name)).sign_consistent
    for name, bound in BOUNDED.items():
        found = rewards.check(rewards.create(name))
        assert found.bounded
        assert found.bound <= bound
    for name in UNBOUNDED:
        found = rewards.check(rewards.create(name))
        assert not found.bounded
        assert found.bounded_counterexample is not None
    trust = rewards.check(rewards.create("trust"))
    assert trust.sign_counterexample is not None
    assert trust.sign_counterexample[2] == 0  # never the wrong sign, but no reward at all
    gate = rewards.check(rewards.create("gate"))
    assert not gate.sign_consistent
    assert gate.sign_counterexample is not None
    t, p, r = gate.sign_counterexample
    assert (t > p) - (t < p) != (r > 0) - (r < 0)


def test_check_judges_a_function_of_ones_own() -> None:
    found = rewards.check(lambda t, p: p - t)
    assert not found.bounded
    assert not found.sign_consistent
    assert rewards.check(lambda t, p: t.exp() - p.exp()).sign_consistent
    assert not rewards.check(lambda t, p: 0 * t.exp()).sign_consistent


def square(t: torch.Tensor, p: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    return weight * (t.exp() ** 2 - p.exp() ** 2)


def wrong_shape(t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return t.sum()


def test_a_users_own_function_by_name() -> None:
    reward = rewards.create(f"{__name__}:square", weight=2.0)
    teacher, student = -torch.rand(5), -torch.rand(5)
    expected = 2 * rewards.create("power", alpha=2)(teacher, student)
    assert torch.allclose(reward(teacher, student), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"expected a tensor of \(5,\), got \(\)"):
        rewards.create(f"{__name__}:wrong_shape")(teacher, student)


def of_one(log_probs: torch.Tensor) -> torch.Tensor:
    return log_probs.exp()


def of_three(t: torch.Tensor, p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return t - p


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("of_one", {}, r"of_one is called with \(teacher_log_probs, student_log_probs\), got"),
        ("of_three", {}, "got a function <Signature .*: missing a required argument: 'ids'"),
        ("square", {"wieght": 1}, r"student_log_probs, wieght=...\).*unexpected keyword"),
    ],
)
def test_a_users_function_is_checked_when_it_is_named(
    name: str, parameters: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rewards.create(f"{__name__}:{name}", **parameters)


def test_a_function_without_a_signature_is_taken_as_it_is() -> None:
    log_probs = torch.tensor([-1.0, -0.5])
    assert rewards.create("torch:add")(log_probs, log_probs).tolist() == [-2.0, -1.0]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("power", {"alpha": 0}, "alpha: expected a number > 0, got 0"),
        ("power", {"alpha": -1.0}, "alpha: expected a number > 0, got -1.0"),
        ("power", {"alpha": math.nan}, "alpha: expected a number > 0, got nan"),
        ("power", {"alpha": True}, "alpha: expected a number > 0, got True"),
        ("power", {"alpha": "5"}, "alpha: expected a number > 0, got '5'"),
        ("power", {"beta": 1}, "beta: unknown parameter of reward power"),
        ("power", {"scale": "log"}, "scale: expected unit or box_cox"),
        ("clip", {"low": 1.0}, "low: expected a number < 0"),
        ("tanh", {"temperature": 0}, "temperature: expected a number > 0"),
        ("gate", {"threshold": 1.0}, r"threshold: expected a number in \[0, 1\)"),
        ("suppress", {"threshold": 0}, r"threshold: expected a number in \(0, 1\], got 0"),
        ("proximal", {"share": 0.0}, r"share: expected a number in \(0, 1\], got 0.0"),
        ("proximal", {"share": 1.5}, r"share: expected a number in \(0, 1\], got 1.5"),
        ("jensen_shannon", {"beta": 1.0}, r"beta: expected a number in \(0, 1\), got 1.0"),
        ("tsallis", {"q": 0}, "q: expected a number > 0, got 0"),
        ("powr", {}, "name: expected one of log_ratio, clip"),
        ("no.such.module:f", {}, "cannot import no.such.module:f"),
        ("poweropd.rewards:nothing", {}, "has no 'nothing'"),
        ("zscore", {"base": {"name": "zscore"}}, "base: expected a reward other than zscore"),
        ("trust", {"base": {"name": "zscore"}}, "base: expected a reward other than zscore"),
        ("trust", {"bound": 0}, "bound: expected a number > 0, got 0"),
        ("power", {"alpha": {"schedule": "linear", "start": 1}}, "needs `end`"),
        ("power", {"alpha": {"schedule": "linear", "start": 1, "end": 0, "steps": 2}}, "got 0"),
        ("power", {"alpha": {"schedule": "step", "start": 1}}, "expected one of constant"),
        ("power", {"alpha": {"schedule": "linear", "from": 1}}, "a schedule has the keys"),
    ],
)
def test_bad_parameters_are_named(name: str, parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards.create(name, **parameters)


def test_the_density_power_divergence_is_a_divergence() -> None:
    torch.manual_seed(0)
    t, p = torch.randn(2, 50, 11, dtype=torch.float64).log_softmax(-1)
    for alpha in (0.1, 1.0, 5.0):
        power = rewards.Power(alpha=alpha)
        assert (power.divergence(t, p) > 0).all()
        assert torch.allclose(power.divergence(p, p), torch.zeros(50, dtype=torch.float64))


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum()


# The divergences by their names, of probabilities t and p.
DIVERGENCES = {
    "log_ratio": (rewards.LogRatio(), lambda t, p: kl(p, t)),
    "power 2": (rewards.Power(2.0), lambda t, p: (p**3 / 3 - p * t**2 + 2 * t**3 / 3).sum()),
    "power 0.5": (
        rewards.Power(0.5),
        lambda t, p: (p**1.5 / 1.5 - p * t**0.5 + 0.5 * t**1.5 / 1.5).sum(),
    ),
    "proximal": (
        rewards.Proximal(0.3),
        lambda t, p: kl(p, 0.3 * t + 0.7 * p) + 3 / 7 * kl(t, 0.3 * t + 0.7 * p),
    ),
    "proximal 1": (rewards.Proximal(1.0), lambda t, p: kl(p, t)),
    "jensen_shannon": (
        rewards.JensenShannon(0.3),
        lambda t, p: 0.7 * kl(p, 0.3 * t + 0.7 * p) + 0.3 * kl(t, 0.3 * t + 0.7 * p),
    ),
    "sign": (rewards.Sign(), lambda t, p: (t - p).abs().sum()),
    "tsallis 0.5": (rewards.Tsallis(0.5, 1e6), lambda t, p: 4 * (1 - (t * p).sqrt().sum())),
    "tsallis 2": (rewards.Tsallis(2.0, 1e6), lambda t, p: ((p**2 / t).sum() - 1) / 2),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_expected_policy_gradient_descends_on_the_divergence(name: str) -> None:
    """By enumeration of a vocabulary of 50, in float64; and the reported value is the divergence's.

    `Reward.__call__` returns float32, so `compute` is asked.
    """
    reward, divergence = DIVERGENCES[name]
    torch.manual_seed(0)
    t = torch.randn(50, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    p = logits.log_softmax(-1)
    value = divergence(t.exp(), p.exp())
    (exact,) = torch.autograd.grad(value, logits, retain_graph=True)
    torch.testing.assert_close(reward.divergence(t, p).double(), value, rtol=1e-5, atol=1e-7)
    assert reward.divergence(p.detach(), p.detach()).abs() < 1e-7
    weights = (p.exp() * reward.compute(t, p)).detach()
    (policy,) = torch.autograd.grad(-(weights * p).sum(), logits)
    torch.testing.assert_close(exact, policy, rtol=1e-9, atol=1e-12)


# Losses of the sampled token that are differentiated themselves (docs/objectives.md), and what
# their expected gradient is the gradient of.
DIFFERENTIATED = {
    "k1": (lambda t, p: p - t, lambda t, p: p.sum() * 0),
    "k2": (lambda t, p: (t - p) ** 2 / 2, lambda t, p: kl(p, t)),
    "k3": (lambda t, p: (t - p).exp() - 1 - (t - p), kl),
    "absolute": (lambda t, p: (t - p).abs(), lambda t, p: (t - p).abs().sum()),
    "power": (lambda t, p: (3 * p).exp() - (3 * t).exp(), lambda t, p: 3 / 4 * (p**4).sum()),
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_what_losses_descend_on_that_are_differentiated_through_the_sample(name: str) -> None:
    loss, descends_on = DIFFERENTIATED[name]
    torch.manual_seed(0)
    t = torch.randn(50, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    p = logits.log_softmax(-1)
    sampled = (p.exp().detach() * loss(t, p)).sum()  # E over the token, which has no gradient
    (found,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(descends_on(t.exp(), p.exp()), logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_reward_is_not_judged_at_points_that_no_sampled_token_has() -> None:
    """A sampled token has a probability under the student; only the teacher's may be 0."""
    vanilla = rewards.check(lambda t, p: t - p)
    assert vanilla.sign_consistent
    assert vanilla.bounded_counterexample == (0.0, 1.0, float("-inf"))
    squashed = rewards.check(lambda t, p: torch.sigmoid(t - p))
    assert squashed.bounded
    assert squashed.bound == 1.0
    assert not squashed.sign_consistent


@pytest.mark.parametrize("name", ["proximal", "jensen_shannon", "sign", "tsallis 0.5", "power 2"])
def test_divergences_are_finite_where_one_model_excludes_a_token(name: str) -> None:
    reward, divergence = DIVERGENCES[name]
    torch.manual_seed(0)
    logits = torch.randn(2, 9, dtype=torch.float64)
    logits[0, 3] = logits[1, 5] = -math.inf
    t, p = logits.log_softmax(-1)
    nearly = (x.exp().clamp(min=1e-300) for x in (t, p))
    assert reward.divergence(t, p).item() == pytest.approx(divergence(*nearly).item(), rel=1e-5)


def test_the_divergence_of_the_log_ratio_is_the_reverse_kl() -> None:
    """Also where the student gives a token no probability: it counts 0."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    logits[1, ..., 5] = -math.inf
    t, p = logits.log_softmax(-1)
    expected = torch.nn.functional.kl_div(t, p, log_target=True, reduction="none").nansum(-1)
    torch.testing.assert_close(rewards.LogRatio().divergence(t, p).double(), expected)
    assert rewards.Power(2.0).divergence(t, p).shape == (3, 4)


def test_code_of_the_users_own_is_found_at_any_depth() -> None:
    own = {"name": "package.module:function"}
    for tree in (own, {"name": "zscore", "base": own}, {**own, "base": {"name": "power"}}):
        assert rewards.names_code(tree)
    for tree in ("a:b", None, {"name": "zscore", "base": {"name": "power", "alpha": 2.0}}):
        assert not rewards.names_code(tree)
