"""Every gold answer of the seven sets is correct against itself, where the data is at hand.

The folder is the environment variable POWEROPD_DATA, else shared/data beside the repository.
"""

import json
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from poweropd.evaluation import benchmarks
from poweropd.grading.grader import Grader

DATA = Path(os.environ.get("POWEROPD_DATA", Path(__file__).parents[2] / "shared" / "data"))
SETS = {
    "gsm8k": 1319, "math500": 500, "amc23": 40, "aime24": 30, "aime25": 30, "minerva": 272,
    "olympiadbench": 675,
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    not (DATA / "gsm8k.jsonl").is_file(),
    reason="the benchmark files are not here: set POWEROPD_DATA to their folder",
)

FORMS = {"box": "Thus \\boxed{%s}", "alone": "%s", "sentence": "The final answer is %s."}


@pytest.mark.parametrize("name", SETS)
def test_every_gold_equals_itself(name: str) -> None:
    problems = benchmarks.load_benchmark(name, data_dir=DATA)
    assert len(problems) == SETS[name]
    with Grader(workers=2) as grader:
        pending = [
            (problem.id, form, grader.submit(problem.answer, text % problem.answer))
            for problem in problems
            for form, text in FORMS.items()
        ]
        wrong = [(i, form, grade.result()) for i, form, grade in pending]
    assert [case for case in wrong if not case[2].correct] == []


def test_different_golds_are_different() -> None:
    """Each MATH-500 answer against the next one, unless it stands in it, as 5 does in x=5."""
    golds = [problem.answer for problem in benchmarks.load_benchmark("math500", data_dir=DATA)]
    pairs = [(a, b) for a, b in pairwise(golds) if a not in b and b not in a]
    with Grader(workers=2) as grader:
        grader.warm_up()
        start = time.monotonic()
        pending = [(a, b, grader.submit(a, rf"\boxed{{{b}}}")) for a, b in pairs]
        accepted = [(a, b) for a, b, grade in pending if grade.result().correct]
        seconds = time.monotonic() - start
    assert accepted == []
    assert seconds < 15


def test_the_sample_of_training_answers() -> None:
    path = DATA / "deepscaler_sample.jsonl"
    golds = [
        json.loads(line)["answer"]
        for line in path.read_text(encoding="utf-8").split("\n")[:1500]
        if line
    ]
    with Grader(workers=2) as grader:
        pending = [(gold, grader.submit(gold, f"\\boxed{{{gold}}}")) for gold in golds]
        assert [gold for gold, grade in pending if not grade.result().correct] == []
