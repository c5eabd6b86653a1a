"""Gold answers have one meaning for benchmarks, task rewards and files of completions."""

import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from poweropd.errors import UsageError
from poweropd.evaluation import benchmarks
from poweropd.evaluation.command import grade_file
from poweropd.grading import grader
from poweropd.grading.golds import read_gold

READ = [
    (4, "4"),
    (2.5, "2.5"),
    (np.int64(7), "7"),
    (Decimal("0.10"), "0.10"),
    (Fraction(2, 3), "2/3"),
    (" 42 ", "42"),
    ("2 + 2 = <<2+2=4>>4\n#### 4", "4"),
    ("So 1,000 of them. #### 1,000", "1,000"),
    ("#### Step 1\nAdd.\n#### Step 2\nSo $x = \\boxed{5}$.", "5"),
    ("We get $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
    ("#### \\boxed{3}", "3"),
    (["$3$", -3], "$3$, -3"),
    (["(1,2)", "(3,4)"], "(1,2), (3,4)"),
    (["1,000", "2"], "1,000; 2"),
    (["12"], "12"),
    (["a", ["b", 3]], "a, b, 3"),
]


@pytest.mark.parametrize(("value", "gold"), READ)
def test_a_gold_is_read_in_every_writing(value: object, gold: str) -> None:
    assert read_gold(value) == gold
    assert read_gold(gold) == gold


@pytest.mark.parametrize(
    "value",
    [None, "", " \n", [], [None], ["1", ""], {}, {"answer": 1}, True, math.nan, math.inf,
     "Work.\n####", "It is \\boxed{}."],
)  # fmt: skip
def test_what_states_nothing_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^got [^\n]+$"):
        read_gold(value)
    grade = grader.grade(value, "\\boxed{1}")
    assert (grade.correct, grade.reason) == (False, "unparsed_gold")
    path = tmp_path / "own.jsonl"
    row = {"problem": "What?", "completion": "\\boxed{1}", "answer": value}
    path.write_text(json.dumps(row) + "\n")
    for read in (lambda: benchmarks.load_benchmark(path), lambda: grade_file(path, {})):
        with pytest.raises(UsageError, match=r"'answer'") as caught:
            read()
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "gold"), [pair for pair in READ if type(pair[0]) in (int, float, str, list)]
)
def test_files_and_benchmarks_read_alike(value: object, gold: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [
        {"id": i, "problem": "What?", "completion": f"\\boxed{{{box}}}", "answer": value}
        for i, box in enumerate([gold, "999"])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert benchmarks.load_benchmark(path)[0].answer == gold
    grades = grade_file(path, {}).grades
    assert grades is not None
    assert [row["correct"] for row in grades] == [True, False]
