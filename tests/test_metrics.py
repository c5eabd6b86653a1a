"""Figures of an evaluation against closed forms, and intervals against the truth."""

import math
import time

import numpy as np
import pytest

from poweropd.evaluation import metrics
from poweropd.evaluation.metrics import Estimate, avg_at_k, maj_at_k, pass_at_k

Rows = list[dict[str, object]]


def test_avg_at_k() -> None:
    assert avg_at_k(np.ones((5, 8), bool)) == 1.0
    assert avg_at_k([[1, 0, 0, 0], [1, 1, 0, 0]]) == pytest.approx(3 / 8)
    assert avg_at_k([[1, 0, 0, 0], [1, 1, 0, 0]], k=2) == pytest.approx(3 / 4)


def test_pass_at_k_is_the_closed_form() -> None:
    grades = np.zeros((1, 10), bool)
    grades[0, :3] = True
    for k in range(1, 11):
        expected = 1 - math.comb(7, k) / math.comb(10, k)
        assert pass_at_k(grades, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_by_hand() -> None:
    """4 samples, k = 2: of the 6 pairs, 5 hold one of two right ones, 3 the only right one."""
    grades = [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert pass_at_k(grades, 2) == pytest.approx((5 / 6 + 3 / 6 + 0) / 3)
    assert pass_at_k(grades, 4) == pytest.approx(2 / 3)


def test_pass_at_k_stays_stable_with_many_samples() -> None:
    grades = np.zeros((1, 4000), bool)
    grades[0, 0] = True
    assert pass_at_k(grades, 1000) == pytest.approx(0.25)


@pytest.mark.parametrize("statistic", [avg_at_k, pass_at_k])
@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_samples(statistic: object, k: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to the 4 samples per problem, got k = {k}"):
        statistic(np.zeros((3, 4), bool), k)  # type: ignore[operator]


def test_the_shape_is_checked() -> None:
    with pytest.raises(ValueError, match=r"\[problems, n\], got shape \(3,\)"):
        avg_at_k(np.ones(3, bool))


@pytest.mark.parametrize(
    ("answers", "correct", "share"),
    [
        (["7", "7.0", "8", "8", "9"], [1, 1, 0, 0, 0], 1 / 2),  # 7 and 7.0 are one answer; a tie
        (["7", "7", "7", "8", "9"], [1, 1, 1, 0, 0], 1.0),
        (["7", "8", "8", "8", "9"], [1, 0, 0, 0, 0], 0.0),
        ([None, None, None, "7", None], [0, 0, 0, 1, 0], 1.0),  # no answer has no vote
        ([None, None, None, None, None], [0, 0, 0, 0, 0], 0.0),
        (["1", "2", "3", "4", "7"], [0, 0, 0, 0, 1], 1 / 5),
    ],
)
def test_maj_at_k(answers: list[str | None], correct: list[int], share: float) -> None:
    assert maj_at_k([answers], [correct]) == pytest.approx(share)


def test_estimates_are_seeded_and_hold_their_mean() -> None:
    values = np.random.default_rng(3).random(50)
    first = metrics.estimate(values, seed=1)
    assert first == metrics.estimate(values, seed=1)
    assert first != metrics.estimate(values, seed=2)
    assert first.low < first.mean < first.high
    assert metrics.estimate(np.ones(20), fraction=True).mean == 1.0
    lost = metrics.estimate(np.zeros(30), fraction=True)
    assert (lost.mean, lost.low) == (0.0, 0.0)
    assert 0.05 < lost.high < 0.2  # thirty failures do not prove that all will fail
    assert metrics.estimate(np.zeros(30)) == Estimate(0.0, 0.0, 0.0)


def _coverage(problems: int, accuracy: float, n: int, trials: int) -> float:
    """How often the interval holds the truth, with problems of differing difficulty for n > 1."""
    generator = np.random.default_rng(17)
    covered = 0
    for trial in range(trials):
        rates = generator.beta(accuracy, 1 - accuracy, problems) if n > 1 else accuracy
        values = generator.binomial(n, rates, problems) / n
        found = metrics.estimate(values, fraction=True, resamples=500, seed=trial)
        covered += found.low <= accuracy <= found.high
    return covered / trials


@pytest.mark.thorough
@pytest.mark.parametrize("accuracy", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("n", [1, 8])
def test_intervals_cover_the_truth(accuracy: float, n: int) -> None:
    assert _coverage(500, accuracy, n, trials=1000) >= 0.93


def test_ten_thousand_resamples_are_fast() -> None:
    values = np.random.default_rng(0).random(500)
    start = time.monotonic()
    metrics.estimate(values, resamples=10_000)
    assert time.monotonic() - start < 2.0


def test_paired_differences_cancel_difficulty() -> None:
    generator = np.random.default_rng(5)
    difficulty = generator.random(200)
    a = {f"p{i}": d for i, d in enumerate(difficulty)}
    b = {name: value - 0.05 for name, value in reversed(a.items())}
    found = metrics.paired_bootstrap(a, b)
    assert found.mean == pytest.approx(0.05)
    assert found.high - found.low < 1e-9
    with pytest.raises(ValueError, match="1 only in the first and 0 only in the second"):
        metrics.paired_bootstrap(a, {k: v for k, v in b.items() if k != "p3"})


def _rows() -> Rows:
    stops = ["<|end|>", "<|end|>", None, "<|stop|>"]
    return [
        {
            "id": f"p{problem}",
            "sample": sample,
            "correct": problem == 0 or (problem == 1 and sample == 0),
            "answer": None if problem == 2 else str(sample * (problem > 0)),
            "reason": "correct" if problem == 0 else "no_answer" if problem == 2 else "wrong",
            "tokens": 10 * (problem + 1) + sample,
            "stop": stops[sample],
        }
        for problem in range(3)
        for sample in range(4)
    ]


def test_summary_of_rows_in_any_order() -> None:
    rows = _rows()
    found = metrics.summarize(rows[::-1], n=4)
    assert found == metrics.summarize(rows)
    assert (found.problems, found.n, found.k) == (3, 4, 4)
    assert found.avg_at_k.mean == pytest.approx((1 + 0.25 + 0) / 3)
    assert found.pass_at_k.mean == pytest.approx(2 / 3)
    assert found.maj_at_k.mean == pytest.approx((1 + 0.25 + 0) / 3)
    assert found.mean_length.mean == pytest.approx(21.5)
    assert found.truncated_fraction.mean == pytest.approx(1 / 4)
    assert found.no_answer_fraction.mean == pytest.approx(1 / 3)
    assert found.stops == {"<|end|>": 6, "truncated": 3, "<|stop|>": 3}
    assert found.reasons["no_answer"] == 4
    assert metrics.summarize(rows, k=2).pass_at_k.mean == pytest.approx((1 + 0.5) / 3)
    assert metrics.problem_values(rows) == {"p0": 1.0, "p1": 0.25, "p2": 0.0}


def test_summaries_need_all_completions() -> None:
    with pytest.raises(ValueError, match="expected 4 completions of every problem, got 3 of 'p2'"):
        metrics.summarize(_rows()[:-1], n=4)
    with pytest.raises(ValueError, match="at least one completion"):
        metrics.summarize([])
