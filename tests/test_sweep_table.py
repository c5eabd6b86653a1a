"""The table of a sweep: what is counted, what is marked, what the paper says beside it."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from poweropd.config import Config
from poweropd.evaluation.metrics import (
    Estimate,
    estimate_over_seeds,
    paired_bootstrap,
    paired_over_seeds,
)
from poweropd.sweep import comparison, paper, table
from poweropd.sweep.comparison import CellResults
from poweropd.sweep.results import BenchmarkFigures, Row, compared, over_seeds

MODELS = {
    "model": {"student": "Qwen/Qwen3-0.6B-Base"},
    "teacher": {"model": "Qwen/Qwen3-4B"},
    "data": {"prompts": "prompts.jsonl"},
}
SEVEN = ["gsm8k", "math500", "amc23", "aime24", "aime25", "minerva", "olympiadbench"]


def config(**sections: Any) -> Config:
    return Config.from_dict({**MODELS, **sections})


@pytest.mark.parametrize(
    ("sections", "gsm8k", "mean"),
    [
        ({"reward": {"name": "power", "alpha": 500}}, (69.77, 87.49, 397), (25.50, 41.89, 1875)),
        ({"reward": {"name": "log_ratio"}}, (61.5, 86.81, 4078), (19.13, 36.18, 4084)),
        ({"reward": {"name": "clip"}}, (65.9, 87.26, 498), (22.49, 38.35, 2343)),
        ({"reward": {"name": "zscore"}}, (56.21, 86.43, 437), (18.25, 36.0, 2316)),
        (
            {"reward": {"name": "log_ratio"}, "objective": {"kind": "full_vocab"}},
            (66.04, 87.08, 4087),
            (22.91, 33.72, 4092),
        ),
    ],
)
def test_the_papers_rows_are_found(
    sections: dict[str, Any], gsm8k: tuple[float, ...], mean: tuple[float, ...]
) -> None:
    found = paper.results(config(**sections), SEVEN)
    assert found is not None
    for name, (average, passed, length) in (("gsm8k", gsm8k), ("mean", mean)):
        assert found[name].avg_at_k == pytest.approx(average / 100, abs=1e-4)
        assert found[name].pass_at_k == pytest.approx(passed / 100, abs=1e-4)
        assert found[name].mean_length == pytest.approx(length, abs=1)  # the paper rounds it


def test_the_papers_mean_is_over_the_same_benchmarks() -> None:
    found = paper.results(config(reward={"name": "clip"}), ["gsm8k", "aime24"])
    assert found is not None
    assert found["mean"].avg_at_k == pytest.approx((0.6590 + 0.0042) / 2)
    assert set(found) == {"gsm8k", "aime24", "mean"}
    part = paper.results(config(reward={"name": "clip"}), ["gsm8k", "mine"])
    assert part is not None
    assert set(part) == {"gsm8k"}


@pytest.mark.parametrize(
    "sections",
    [
        {"reward": {"name": "power", "alpha": 7}},
        {"reward": {"name": "clip", "low": -5.0}},
        {"reward": {"name": "power", "alpha": 5, "scale": "box_cox"}},
        {"reward": {"name": "power"}, "objective": {"kind": "full_vocab"}},
        {"teacher": {"model": "Qwen/Qwen3-32B"}},
    ],
)
def test_what_the_paper_did_not_run_has_no_row(sections: dict[str, Any]) -> None:
    assert paper.results(config(**sections), SEVEN) is None


def test_an_estimate_over_seeds_covers_problems_and_seeds() -> None:
    generator = np.random.default_rng(0)
    values = generator.random((1, 400)) < 0.5
    alone = estimate_over_seeds(values)
    assert alone.mean == values.mean()
    assert (alone.high - alone.low) / 3.92 == pytest.approx(0.5 / 20, rel=0.1)
    apart = estimate_over_seeds(np.vstack([values * 0.0, values * 0.0 + 1.0]))
    assert (apart.low, apart.high) == (0.0, 1.0)  # two seeds that disagree on all
    # A mean over two independent benchmarks varies less than one of them.
    both = estimate_over_seeds(values, generator.random((1, 400)) < 0.5)
    assert both.high - both.low == pytest.approx((alone.high - alone.low) / 2**0.5, rel=0.1)
    assert estimate_over_seeds(np.zeros((2, 30))).high > 0.03  # thirty failures prove little
    with pytest.raises(ValueError, match=r"shape \[seeds, problems\]"):
        estimate_over_seeds(np.zeros((2, 3)), np.zeros((1, 3)))


def result(solved: dict[str, float], n: int, length: float) -> dict[str, Any]:
    return {"n": n, "k": n, "solved": solved, "mean_length": {"mean": length}}


def test_seeds_and_benchmarks_are_averaged() -> None:
    first = {"a": result({"1": 0.5, "2": 0.0}, 2, 10), "b": result({"1": 1.0}, 2, 20)}
    second = {"a": result({"1": 1.0, "2": 0.5}, 2, 30), "b": result({"1": 0.0}, 2, 40)}
    found = over_seeds([first, second])
    assert list(found) == ["a", "b", "mean"]
    assert found["a"].avg_at_k.mean == pytest.approx((0.25 + 0.75) / 2)
    assert found["a"].pass_at_k.mean == pytest.approx((0.5 + 1.0) / 2)
    assert found["a"].seeds == pytest.approx([0.25, 0.75])
    assert found["mean"].avg_at_k.mean == pytest.approx((0.5 + 0.5) / 2)
    assert found["mean"].seeds == pytest.approx([0.625, 0.375])
    assert found["mean"].mean_length == pytest.approx(25)
    assert found["a"].avg_at_k.low <= 0.5 <= found["a"].avg_at_k.high


def row(cell: str, average: float | None, **options: Any) -> Row:
    found = {}
    if average is not None:
        estimates = [Estimate(a, a - 0.1, a + 0.1) for a in (average, average + 0.2)]
        found = {"gsm8k": BenchmarkFigures(8, *estimates, 300.0, [average])}
    return Row(cell, 1, int(average is not None), {}, found, {"reverse_kl": 0.5}, **options)


@pytest.fixture
def rows() -> list[Row]:
    ours = paper.results(config(reward={"name": "power", "alpha": 500}), ["gsm8k"])
    return [
        row(
            "alpha=500",
            0.7,
            of_paper=ours,
            best={"gsm8k": ["avg_at_k"]},
            minus_baseline={"gsm8k": Estimate(0.1, 0.05, 0.15)},
        ),
        row("clip", 0.6),
        row("tanh", 0.5),
        row("same as clip", 0.6, minus_baseline={"gsm8k": Estimate(0.0, -0.02, 0.02)}),
        row("failed", None),
    ]


def solving(*seeds: dict[str, float]) -> CellResults:
    """A cell whose runs, from seed 42 on, solved so much of each problem of one benchmark."""
    found = enumerate((result(one, 4, 10) for one in seeds), 42)
    return CellResults({seed: {"a": one} for seed, one in found})


def test_differences_are_paired_by_problem_and_seed() -> None:
    generator = np.random.default_rng(0)
    hard = generator.integers(0, 4, (2, 300)) / 4  # most of what varies is the problem
    better = np.clip(hard + (generator.random((2, 300)) < 0.2) / 4, 0, 1)
    solved = [
        [{str(i).zfill(3): float(v) for i, v in enumerate(seed)} for seed in values]
        for values in (better, hard)
    ]
    a, b = (solving(*seeds) for seeds in solved)
    found = comparison.paired_difference(a, b, ["a"], "avg_at_k")
    assert found is not None
    assert found.mean == pytest.approx((better - hard).mean())
    assert 0 < found.low < found.mean < found.high
    assert found.high - found.low < 0.03  # unpaired, it would be three times that
    alone, single = (
        paired_over_seeds((better[:1], hard[:1])),
        paired_bootstrap(*next(zip(*solved, strict=True))),
    )
    assert alone.mean == pytest.approx(single.mean)
    assert (alone.low, alone.high) == pytest.approx((single.low, single.high), abs=5e-3)
    # Only the seed that both have counts; other problems cannot be compared at all.
    common = comparison.paired_difference(a, CellResults({43: b.by_seed[43]}), ["a"], "avg_at_k")
    assert common is not None
    assert common.mean == pytest.approx((better - hard)[1].mean())
    assert comparison.paired_difference(a, solving({"other": 1.0}), ["a"], "avg_at_k") is None
    with pytest.raises(ValueError, match=r"shape \[seeds, problems\]"):
        paired_over_seeds((np.zeros((2, 3)), np.zeros((2, 3))), (np.zeros((1, 3)), np.zeros(3)))


def test_a_best_needs_a_paired_interval_against_every_other_row() -> None:
    ids = [str(i) for i in range(200)]
    cells = {
        "far": solving(dict.fromkeys(ids, 1.0)),
        "near": solving({id: float(i % 20 > 0) for i, id in enumerate(ids)}),
        "low": solving({id: float(i % 2) for i, id in enumerate(ids)}),
    }
    figures = {"a": row("", 0.5).benchmarks["gsm8k"]}
    rows = [Row(cell, 1, 1, {}, figures) for cell in cells]
    found = {r.cell: r for r in compared(rows, cells, "low")}
    assert found["far"].best == {"a": ["avg_at_k", "pass_at_k"]}
    assert found["near"].best == found["low"].best == {}
    assert found["low"].minus_baseline == {}
    assert found["near"].minus_baseline["a"].mean == pytest.approx(0.45)
    same = {"one": cells["near"], "two": cells["near"], "low": cells["low"]}
    unsure = [Row(cell, 1, 1, {}, figures) for cell in same]
    assert all(r.best == r.minus_baseline == {} for r in compared(unsure, same, None))
    text = table.markdown(compared(unsure, same, "low"), best=False, baseline="low")
    assert "No row is better than every other one" in text
    assert "| +45.00 [" in text


def test_the_best_and_differences_from_the_baseline_are_shown(rows: list[Row]) -> None:
    text = table.markdown(rows, best=False, baseline="clip")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "**70.00** [60.0, 80.0]" in lines["alpha=500"]
    assert "| +10.00 [+5.0, +15.0] |" in lines["alpha=500"]
    assert "| 60.00 [" in lines["clip"]
    assert "| +0.00 [-2.0, +2.0] |" in lines["same as clip"]
    assert "gsm8k Avg@8 minus clip" in lines[""]
    assert "| 50.00 [" in lines["tanh"]
    assert "| – | – |" in lines["failed (0 of 1 seeds)"]
    assert lines["*paper (k = 8)*"].startswith("| *paper (k = 8)* | 69.77 | 87.49 |  | 397 |")
    assert len({line.count("|") for line in lines.values()}) == 1


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_terminal_cuts_no_number(rows: list[Row], width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    table.print_table(rows, best=True, baseline="clip", console=console)
    text = console.export_text()
    assert "70.00 ▲" in text
    assert text.count("▲") == 2  # and in the legend
    assert "+10.00" in text
    assert "69.77" in text
    assert "…" not in text
    assert "best evaluated step" in " ".join(text.split())


def test_numbers_for_programs(rows: list[Row]) -> None:
    (first, *_, last) = csv.DictReader(io.StringIO(table.as_csv(rows, "clip")))
    assert float(first["gsm8k Avg@8"]) == 0.7
    assert float(first["gsm8k Pass@8 high"]) == pytest.approx(1.0)
    assert float(first["gsm8k paper Avg@8"]) == pytest.approx(0.6977)
    assert last["gsm8k Avg@8"] == ""
    assert float(first["gsm8k Avg@8 minus clip low"]) == 0.05
    content = json.loads(table.as_json(rows, best=True, baseline="clip"))
    assert content["baseline"] == "clip"
    assert content["step"] == "best"
    assert content["rows"][1]["benchmarks"]["gsm8k"]["avg_at_k"]["mean"] == 0.6


def test_a_sweep_without_evaluation_says_how_to_have_one(tmp_path: Path) -> None:
    text = table.markdown([row("alpha=1", None)], best=False, baseline=None)
    assert "evaluate: {every: 500, benchmarks: [math500], n: 8}" in text
    assert "0.500" in text
