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
BOUNDED = {"clip": 1.0, "tanh": 1.0, "power": 1.0, "hellinger": 10.0, "gate": 1.0}
SIGN_CONSISTENT = ["log_ratio", "clip", "tanh", "power", "hellinger"]


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


@given(LOG_PROB, LOG_PROB)
def test_tanh_is_a_ratio_of_powers(t: float, p: float) -> None:
    teacher, student = (x.double() for x in pair(t, p))
    a = 2 / 5
    shift = torch.maximum(teacher, student)
    powers = ((teacher - shift) * a).exp(), ((student - shift) * a).exp()
    expected = (powers[0] - powers[1]) / (powers[0] + powers[1])
    assert torch.allclose(rewards.create("tanh")(teacher, student).double(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [n for n in rewards.REWARDS if n != "zscore"])
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
    assert not rewards.check(rewards.create("log_ratio")).bounded
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
        ("powr", {}, "name: expected one of log_ratio, clip"),
        ("no.such.module:f", {}, "cannot import no.such.module:f"),
        ("poweropd.rewards:nothing", {}, "has no 'nothing'"),
        ("zscore", {"base": {"name": "zscore"}}, "base: expected a reward other than zscore"),
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


@pytest.mark.parametrize("reward", [rewards.LogRatio(), rewards.Power(2.0), rewards.Power(0.5)])
def test_the_expected_policy_gradient_descends_on_the_divergence(reward: rewards.Reward) -> None:
    torch.manual_seed(0)
    t = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    p = logits.log_softmax(-1)
    if isinstance(reward, rewards.LogRatio):
        divergence = (p.exp() * (p - t)).sum()
    else:
        divergence = reward.divergence(t, p)
    (exact,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    weights = (p.exp() * reward(t, p)).detach()
    (policy,) = torch.autograd.grad(-(weights * p).sum(), logits)
    assert torch.allclose(exact, policy, rtol=1e-5, atol=1e-8)


def test_a_reward_is_not_judged_at_points_that_no_sampled_token_has() -> None:
    """A sampled token has a probability under the student; only the teacher's may be 0."""
    vanilla = rewards.check(lambda t, p: t - p)
    assert vanilla.sign_consistent
    assert vanilla.bounded_counterexample == (0.0, 1.0, float("-inf"))
    squashed = rewards.check(lambda t, p: torch.sigmoid(t - p))
    assert squashed.bounded
    assert squashed.bound == 1.0
    assert not squashed.sign_consistent


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
