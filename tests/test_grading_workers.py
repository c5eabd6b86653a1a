"""Grading processes: limits, deaths, what they load, and what is remembered."""

import multiprocessing
import os
import random
import re
import string
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

from poweropd.grading import answers, exact, shapes
from poweropd.grading import grader as grading_grader
from poweropd.grading.grader import REASONS, Grader, Rule

#: Texts that a careless pattern reads once for each of their characters; repeated to 200,000.
FRAGMENTS = [
    *string.printable, "####", "#### ", "####1", "#### 1. a\n", r"\boxed{", r"\boxed", r"\fbox ",
    "Answer:", "answer ", "answer is ", "answer: a b c d e f\n", "A:", "A: *", "---", " \n", "\n* ",
    "$$", "$ ", "$a$,", "$$a$$,", r"\[", r"\]", r"\(", r"\$", "{}", r"\{", "<<", "<|im_end|>",
    "</think>", "(1,", "1,000,", "1 000 ", "1 1/", "1 and ", "€", r"\frac{", r"\frac{1}{2}", "ab$",
    "final value ", "then ", "because ", "答案", "Question:", "\nQ:", "1 percent ", "xyz ",
    "2 m/s ", "**", " square units",
]  # fmt: skip
_CHOICE = random.Random(0)
PAIRS = ["".join(_CHOICE.sample(string.printable, 2)) for _ in range(100)]
MIXED = ["".join(_CHOICE.sample(FRAGMENTS, 3)) for _ in range(60)]

TOWER = r"\boxed{10^{10^{10^{10}}}}"


@pytest.mark.parametrize(
    "completion",
    [TOWER, r"\boxed{" + "{" * 50_000 + "}" * 50_000 + "}", r"\boxed{\sum_{n=1}^{10^9} \sin(n!)}"],
    ids=["tower", "braces", "sum"],
)
def test_endless_answers_cost_the_time_limit_at_most(completion: str) -> None:
    with Grader(workers=1, timeout=0.5) as grader:
        grader.warm_up()
        start = time.monotonic()
        grade = grader.grade("5", completion)
        seconds = time.monotonic() - start
        assert (grade.correct, grade.reason) == (False, "timeout")
        assert seconds < 0.5 + 1.0
        assert grader.grade("x + 1", r"\boxed{1 + x}").correct


@pytest.mark.thorough
def test_the_search_is_linear() -> None:
    """A search that is quadratic in one of these texts takes minutes; this one takes 0.3 s."""
    slow = {}
    for fragment in [*FRAGMENTS, *PAIRS, *MIXED]:
        start = time.process_time()
        answers.extract(fragment * (200_000 // len(fragment)))
        seconds = time.process_time() - start
        if seconds > 3:
            slow[fragment] = seconds
    assert slow == {}


def test_what_runs_in_the_caller_is_quick() -> None:
    """Answers are compared in the caller up to this length, where nothing could end a search."""
    slow = {}
    for fragment in [*FRAGMENTS, *PAIRS, *MIXED]:
        answer = "1" + fragment * (exact.LONGEST // len(fragment) - 1) + "|"
        start = time.process_time()
        exact.quick("x + 1", answer, Rule())
        shapes.lists_several(answer)
        seconds = time.process_time() - start
        if seconds > 1:
            slow[fragment] = seconds
    assert slow == {}


def test_long_completions_are_searched_by_workers() -> None:
    long = "Well. " * 5_000
    with Grader(workers=1, timeout=20.0) as grader:
        pending = [grader.submit("x + 1", rf"{long}\boxed{{{i} + x}}") for i in (1, 2)]
        hashes = grader.submit("5", "#" * 131_000)
        assert not hashes.done()
    assert [grade.result().correct for grade in pending] == [True, False]
    assert hashes.result().reason == "no_answer"
    assert grader.counts["crash"] == 0


def test_a_search_keeps_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "extract", partial(re.search, "(a+)+$"))  # never ends
    with Grader(workers=1, timeout=0.3) as grader:
        grader.warm_up()
        grade = grader.grade("5", "a" * 20_000 + "b")
    assert (grade.correct, grade.reason) == (False, "timeout")


def test_a_crash_of_the_parser_is_told() -> None:
    with Grader(workers=1, timeout=20.0) as grader:
        grade = grader.grade("x", r"\boxed{" + "(" * 400 + "y" + ")" * 400 + "}")
        assert (grade.correct, grade.reason) == (False, "crash")
        assert "RecursionError" in grade.detail


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_worker_that_dies_is_replaced() -> None:
    with Grader(workers=1, timeout=20.0) as grader:
        grader.warm_up()
        pending = grader.submit("5", TOWER)
        waiting = grader.submit("x + 2", r"\boxed{2 + x}")
        time.sleep(0.3)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, 9)
        grade = pending.result(timeout=20)
        assert (grade.reason, grade.correct) == ("crash", False)
        assert grade.detail
        assert waiting.result(timeout=20).correct


def test_counts_name_every_reason_and_the_cache_is_counted() -> None:
    with Grader(workers=1) as grader:
        for _ in range(3):
            grader.grade("2x", r"\boxed{x + x}")
        grader.grade("2", "no idea")
        assert grader.counts == dict.fromkeys(REASONS, 0) | {"correct": 3, "no_answer": 1}


def test_a_cached_verdict_needs_no_worker() -> None:
    with Grader(workers=1, timeout=0.5) as grader:
        assert grader.grade("5", TOWER).reason == "timeout"
        start = time.monotonic()
        assert grader.grade("5", "Again: " + TOWER).reason == "timeout"
        assert time.monotonic() - start < 0.2


def test_submitted_work_ends_before_closing() -> None:
    with Grader(workers=2) as grader:
        futures = [grader.submit(f"x + {i}", rf"\boxed{{{i} + x}}") for i in range(1, 20)]
    assert all(future.result().correct for future in futures)


def test_the_shared_grader() -> None:
    assert grading_grader.grade("18", "9 * 2 = 18\n#### 18").correct
    assert grading_grader.grade("x^2 - 1", r"\boxed{(x-1)(x+1)}").correct


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"timeout": 0}])
def test_settings_out_of_range(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Grader(**arguments)


@pytest.mark.thorough
def test_workers_load_neither_torch_nor_the_script(tmp_path: Path) -> None:
    """Even for a script that imports torch and has no main guard; and the parent needs no sympy."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            import poweropd.grading.grader as grading
            import poweropd.evaluation.metrics
            assert not {"torch", "transformers", "sympy", "math_verify"} & set(sys.modules)
            import torch
            from poweropd.grading import workers
            print("script runs")
            with workers.worker_pool(1) as pool:
                code = "sorted({'torch', 'transformers', 'sympy'} & set(__import__('sys').modules))"
                print(pool.schedule(eval, args=(code,)).result())
            print(grading.grade("x + 1", "$1 + x$").correct)
        """)
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stderr == ""
    assert run.stdout.split("\n")[:3] == ["script runs", "['sympy']", "True"]
