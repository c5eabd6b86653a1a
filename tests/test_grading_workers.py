"""Grading processes: limits, deaths, what they load, and what is remembered."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from poweropd.grading import grader as grading_grader
from poweropd.grading.grader import REASONS, Grader

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
