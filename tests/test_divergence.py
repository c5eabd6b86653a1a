"""Divergence from the teacher: exact where it can be, sampled and said so where it cannot."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_server import NAME, TeacherServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from poweropd import Config, commands, stops
from poweropd.config.data import DataConfig
from poweropd.config.teachers import TeacherConfig
from poweropd.errors import RunError, UsageError
from poweropd.evaluation.divergence import paired_differences, summarize_divergence
from poweropd.evaluation.divergence_command import (
    DivergenceReport,
    ModelOptions,
    measure_divergence,
)
from poweropd.evaluation.intervals import estimate, estimate_ratio, paired_ratios
from poweropd.evaluation.judging import Judges
from poweropd.evaluation.settings import DivergenceSettings
from poweropd.kernels import Head, TeacherHead, compare_heads
from poweropd.runs.files import read_jsonl
from poweropd.runs.metrics import OF_DIVERGENCE

pytestmark = pytest.mark.usefixtures("soon")
MAKES = Callable[..., Config]
SETTINGS = DivergenceSettings(n=2, max_new_tokens=10, group_size=8)


def measure(
    model: Path, teacher: TeacherConfig | Path, few: Path, folder: Path, **settings: Any
) -> DivergenceReport:
    if isinstance(teacher, Path):
        teacher = TeacherConfig(model=str(teacher), dtype="float32")
    chosen = DivergenceSettings(**{**vars(SETTINGS), **settings})
    options = ModelOptions("float32", trust_remote_code=False, batch_size=4)
    return measure_divergence(
        str(model), teacher, DataConfig(prompts=str(few)), chosen, folder, options
    )


@pytest.fixture(scope="module")
def measured(
    student_dir: Path, teacher_dir: Path, few: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DivergenceReport, Path]:
    folder = tmp_path_factory.mktemp("measured")
    return measure(student_dir, teacher_dir, few, folder), folder


# The numbers.


@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.5}])
def test_heads_are_compared_exactly(options: dict[str, float], chunk_size: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(20, size, generator=generator) for size in (8, 12))
    weight, other_weight = (torch.randn(50, size, generator=generator) for size in (8, 12))
    targets = torch.randint(50, (20,), generator=generator)
    head, teacher = Head(weight, **options), TeacherHead(other, Head(other_weight))
    found = compare_heads(hidden, head, targets, teacher, chunk_size=chunk_size)
    logits = options.get("scale", 1.0) * hidden.double() @ weight.double().T
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    p, t = logits.log_softmax(1), (other.double() @ other_weight.double().T).log_softmax(1)
    near = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    near(found.reverse_kl.double(), (p.exp() * (p - t)).sum(1))
    assert torch.equal(found.greedy, p.argmax(1))
    assert torch.equal(found.teacher_greedy, t.argmax(1))
    own = p.gather(1, targets[:, None]).squeeze(1)
    near(found.statistics.log_probs.double(), own)
    alone = compare_heads(hidden, head, targets, chunk_size=chunk_size)
    assert torch.equal(alone.greedy, found.greedy)
    assert alone.reverse_kl.isnan().all()


def test_merged_ids_are_one_action() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(size, generator=generator) for size in ((9, 8),) * 3)
    targets, merged = torch.arange(9), torch.tensor([5, 2])
    teacher = TeacherHead(hidden, Head(other))
    found = compare_heads(hidden, Head(weight), targets, teacher, merged_ids=merged)
    p, t = [(hidden @ w.T).double().log_softmax(1) for w in (weight, other)]
    for x in (p, t):
        x[:, 2] = x[:, [2, 5]].logsumexp(1)
        x[:, 5] = -1e30
    near = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    near(found.reverse_kl.double(), (p.exp() * (p - t)).sum(1))
    agreement = (p.argmax(1) == t.argmax(1)).tolist()
    assert (found.greedy == found.teacher_greedy).tolist() == agreement
    assert found.statistics.log_probs[5].item() == pytest.approx(p[5, 2].item(), abs=1e-5)
    alone = compare_heads(hidden, Head(weight), targets, merged_ids=merged)
    assert torch.equal(alone.greedy, found.greedy)


@torch.no_grad()
def dense(student: Path, teacher: Path, few: Path, row: dict[str, Any]) -> dict[str, float]:
    """The sums of a row's judged tokens, from whole distributions in float64.

    The probabilities of all stop ids of both models are added up.
    """
    tokenizer = AutoTokenizer.from_pretrained(student)
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float64)
    models = [load(student), load(teacher)]
    tokenizers = [tokenizer, AutoTokenizer.from_pretrained(teacher)]
    ends = {
        i
        for t, m in zip(tokenizers, models, strict=True)
        for i in stops.stop_ids(t, m.generation_config)
    }
    text = json.loads(few.read_text().splitlines()[int(row["id"])])["problem"]
    turn = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    if row["stop"] is not None:
        completion.append(tokenizer.convert_tokens_to_ids(row["stop"]))
    assert len(completion) == row["tokens"] == row["length"]
    inputs, own = torch.tensor([ids + completion]), sorted(ends)
    p, t = [m(inputs).logits[0, len(ids) - 1 : -1].log_softmax(-1) for m in models]
    for x in (p, t):
        x[:, own[0]] = x[:, own].logsumexp(1)
        x[:, own[1:]] = -1e30
    target = torch.tensor([[own[0] if i in ends else i] for i in completion])
    return {
        "reverse_kl": (p.exp() * (p - t)).sum().item(),
        "agreement": (p.argmax(1) == t.argmax(1)).sum().item(),
        "teacher_log_prob": t.gather(1, target).sum().item(),
        "sampled": (p - t).gather(1, target).sum().item(),
    }


def plain_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows whose text gives their tokens again: no special token but the last, a letter a token."""
    rows = read_jsonl(folder / "divergence.jsonl")
    return [row for row in rows if row["tokens"] == len(row["completion"]) + bool(row["stop"])]


def test_the_figures_are_those_of_whole_distributions(
    measured: tuple[DivergenceReport, Path], student_dir: Path, teacher_dir: Path, few: Path
) -> None:
    report, folder = measured
    found = plain_rows(folder)
    assert {row["stop"] is None for row in found} == {True, False}
    for row in found[:8]:
        expected = dense(student_dir, teacher_dir, few, row)
        for key in ("reverse_kl", "agreement", "teacher_log_prob"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key
    divergence, rows = report.divergence, read_jsonl(folder / "divergence.jsonl")
    tokens = sum(row["tokens"] for row in rows)
    assert (divergence.estimate, divergence.prompts, divergence.n) == ("exact", 10, 2)
    assert divergence.tokens == tokens
    assert divergence.figures.keys() == OF_DIVERGENCE.keys()
    total = sum(row["reverse_kl"] for row in rows)
    assert divergence.figures["reverse_kl"].mean == pytest.approx(total / tokens)
    lengths = [row["length"] for row in rows]
    assert divergence.figures["mean_length"].mean == pytest.approx(np.mean(lengths))
    truncated = np.mean([row["stop"] is None for row in rows])
    assert divergence.figures["truncated_fraction"].mean == pytest.approx(truncated)


def test_a_model_is_no_way_from_itself(student_dir: Path, few: Path, tmp_path: Path) -> None:
    figures = measure(student_dir, student_dir, few, tmp_path).divergence.figures
    assert figures["reverse_kl"].mean == pytest.approx(0, abs=1e-6)
    assert figures["reverse_kl"].high == pytest.approx(0, abs=1e-6)
    assert figures["agreement"].mean == figures["agreement"].high == 1
    assert figures["agreement"].low < 1  # ten prompts do not prove it


def test_a_served_teacher_agrees_in_what_it_tells(
    measured: tuple[DivergenceReport, Path],
    server: TeacherServer,
    student_dir: Path,
    teacher_dir: Path,
    few: Path,
    tmp_path: Path,
) -> None:
    teacher = TeacherConfig(model=NAME, servers=[server.url], tokenizer=str(teacher_dir))
    served = measure(student_dir, teacher, few, tmp_path)
    assert served.to_dict()["estimate"] == "sampled"
    local = read_jsonl(measured[1] / "divergence.jsonl")
    remote = read_jsonl(tmp_path / "divergence.jsonl")
    for here, there in zip(local, remote, strict=True):
        assert here["completion"] == there["completion"]
        assert here["agreement"] == there["agreement"]
        # At its end the server tells of its most probable stop tokens alone.
        assert here["teacher_log_prob"] > there["teacher_log_prob"] - 1e-4
        if here["stop"] is None:
            assert here["teacher_log_prob"] == pytest.approx(there["teacher_log_prob"], abs=1e-4)
    truncated = [row for row in plain_rows(tmp_path) if row["stop"] is None]
    assert len(truncated) >= 3
    for row in truncated[:3]:
        expected = dense(student_dir, teacher_dir, few, row)["sampled"]
        assert row["reverse_kl"] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.thorough
def test_the_sampled_estimate_is_of_the_exact_figure(
    server: TeacherServer, student_dir: Path, teacher_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    teacher = TeacherConfig(model=NAME, servers=[server.url], tokenizer=str(teacher_dir))
    figures = [
        measure(student_dir, one, prompts, tmp_path / name, n=2).divergence.figures["reverse_kl"]
        for name, one in {"here": teacher_dir, "there": teacher}.items()
    ]
    exact, sampled = figures
    half = (sampled.high - sampled.low) / 2
    assert abs(sampled.mean - exact.mean) < 1.3 * half  # 2.5 standard errors
    assert exact.high - exact.low < 2 * half  # what the exact one is for


# Intervals.


def test_a_ratio_weighs_problems_by_their_counts() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 200, 150).astype(float)
    totals = counts * generator.normal(2.0, 0.5, 150)
    found = estimate_ratio(totals, counts)
    assert found.mean == pytest.approx(totals.sum() / counts.sum())
    # The delta method: the deviations from the ratio, over the mean count.
    deviations = (totals - found.mean * counts) / counts.mean()
    half = 1.96 * deviations.std(ddof=1) / np.sqrt(len(counts))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    equal = estimate_ratio(totals, np.ones(150))
    assert equal.mean == pytest.approx(estimate(totals).mean)
    assert equal.low == pytest.approx(estimate(totals).low, rel=0.05)
    assert estimate_ratio([0.0] * 30, [5.0] * 30).high == 0
    assert estimate_ratio([0.0] * 30, [5.0] * 30, fraction=True).high > 0.01
    assert estimate_ratio([1.0, 0.0], [1.0, 0.0]).mean == 1  # one problem has no tokens
    with pytest.raises(ValueError, match="a count above 0"):
        estimate_ratio([0.0], [0.0])


def test_pairs_of_ratios_cancel_what_they_share() -> None:
    generator = np.random.default_rng(1)
    hard = generator.normal(3.0, 1.0, 100)
    a = {str(i): (10 * (h - 0.1), 10.0) for i, h in enumerate(hard)}
    b = {str(i): (20 * h, 20.0) for i, h in enumerate(hard)}
    found = paired_ratios(a, b)
    assert found.mean == pytest.approx(-0.1)
    assert found.low == pytest.approx(-0.1)
    alone = estimate_ratio(*zip(*a.values(), strict=True))
    assert alone.high - alone.low > 0.2
    with pytest.raises(ValueError, match="the same problem ids"):
        paired_ratios(a, {"0": (1.0, 1.0)})


def test_the_same_seeds_pair_two_students(
    measured: tuple[DivergenceReport, Path],
    student_dir: Path,
    teacher_dir: Path,
    few: Path,
    tmp_path: Path,
) -> None:
    again = measure(student_dir, teacher_dir, few, tmp_path / "again", group_size=3)
    for name, figure in again.divergence.figures.items():
        assert figure.mean == pytest.approx(measured[0].divergence.figures[name].mean, rel=1e-5)
    other = measure(student_dir, teacher_dir, few, tmp_path / "other", seed=1)
    assert other.divergence.figures != measured[0].divergence.figures
    pairs = [report.divergence.per_prompt for report in (again, measured[0])]
    for found in paired_differences(*pairs).values():
        assert (found.mean, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-5)


# What is kept.


def test_an_interrupted_evaluation_goes_on(
    measured: tuple[DivergenceReport, Path],
    student_dir: Path,
    teacher_dir: Path,
    few: Path,
    tmp_path: Path,
) -> None:
    report, folder = measured
    lines = (folder / "divergence.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (0, 8, 11):
        own = tmp_path / str(kept)
        own.mkdir()
        (own / "divergence.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:30])
        again = measure(student_dir, teacher_dir, few, own)
        assert again.divergence == report.divergence
        assert (own / "divergence.jsonl").read_bytes() == b"".join(lines)
    with pytest.raises(UsageError, match=r"of another evaluation \(n: 2 != 1\)"):
        measure(student_dir, teacher_dir, few, folder, n=1)
    with pytest.raises(UsageError, match=r"of another evaluation \(model: "):
        measure(teacher_dir, teacher_dir, few, folder)


def test_a_full_disk_keeps_what_was_written(
    student_dir: Path, teacher_dir: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")

    def fill(judges: Judges, flags: list[bool]) -> list[bool]:
        (tmp_path / "divergence.jsonl").symlink_to("/dev/full")
        return flags

    monkeypatch.setattr(Judges, "any_process", fill)
    with pytest.raises(RunError, match=r"cannot write a completion \(No space left on device\)"):
        measure(student_dir, teacher_dir, few, tmp_path)


# The command.


def run_eval(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["poweropd", "eval", *arguments])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    return int(stopped.value.code or 0)


def test_the_command_writes_and_compares(
    student_dir: Path,
    teacher_dir: Path,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def options(model: Path, name: str) -> list[str]:
        chosen = ["--teacher", str(teacher_dir), "--prompts", str(few), "--dtype", "float32"]
        return [str(model), *chosen, "--max-new-tokens", "6", "--out", str(tmp_path / name)]

    first = tmp_path / "first.json"
    assert run_eval([*options(student_dir, "a"), "--json", str(first)], monkeypatch) == 0
    found = json.loads(first.read_text())
    assert found["estimate"] == "exact"
    assert found["divergence"].keys() == OF_DIVERGENCE.keys()
    assert found["settings"]["temperature"] == 1.0
    assert len(found["per_prompt"]) == found["prompts"] == 10
    assert "the reverse KL is exact" in " ".join(capsys.readouterr().out.split())
    assert run_eval([*options(teacher_dir, "b"), "--compare", str(first)], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "Minus first, paired by prompt" in shown
    expected = -found["divergence"]["reverse_kl"]["mean"]
    assert f"{expected:+.4f}" in shown
    wrong = [*options(teacher_dir, "b"), "--limit", "5", "--compare", str(first)]
    wrong[wrong.index(str(tmp_path / "b"))] = str(tmp_path / "c")
    assert run_eval(wrong, monkeypatch) == 2
    assert "on the same prompts with the same settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prompts", "p.jsonl"],
            "--prompts, --teacher: the divergence from a teacher needs both",
        ),
        (["--teacher", "embedded:teacher"], "needs both, such as --teacher"),
        (
            ["--teacher", "t", "--prompts", "p", "--benchmark", "embedded"],
            "--benchmark: it belongs to benchmarks",
        ),
        (["--teacher", "t", "--prompts", "p", "--top-k", "5"], "--top-k: it belongs to benchmarks"),
        (
            ["--teacher", "embedded:teacher", "--prompts", "EMPTY"],
            "empty.jsonl: expected at least one row, got none",
        ),
        (
            ["--teacher", "t", "--prompts", "p", "--teacher-server", "localhost:8000"],
            "--teacher-server: expected a base URL",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    given = [str(empty) if argument == "EMPTY" else argument for argument in arguments]
    assert run_eval(["embedded:student", *given], monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_judge_is_an_error() -> None:
    row = {"id": "0", "sample": 0, "completion": "", "length": 1, "stop": "x", "tokens": 0}
    sums = {"reverse_kl": 0.0, "agreement": 0, "teacher_log_prob": 0.0}
    with pytest.raises(ValueError, match="a count above 0"):
        summarize_divergence([{**row, **sums}], "exact")
