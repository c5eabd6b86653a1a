"""Hostile completions, golds and files of completions: a grade or one line, soon, and a true one.

`make fuzz` tries many more of them than the suite does.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hostile_values import EXAMPLES, fuzz, json_texts, leaves, trees
from hypothesis import given, settings
from hypothesis import strategies as st

from poweropd import commands
from poweropd.grading.golds import read_gold
from poweropd.grading.grader import REASONS, Grader

TIMEOUT = 2.0
SECONDS = 30  # for one grade, on a busy machine

PIECES = [
    *("\\boxed{", "\\boxed", "}", "{", "(", ")", "[", "]", "\\{", "\\}", "$", "$$", "\\[", "\\("),
    *("\\frac", "\\frac{", "\\sqrt", "sqrt(", "\\sum_{n=1}^{9} ", "\\int ", "\\lim_{x\\to 0}", "!"),
    *("\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\left(", "\\right)", "\\text{", "\\pm "),
    *("x", "y", "n", "e", "i", "\\pi ", "pi", "theta", "0", "1", "2", "-3", "10", "0.5", "1,000"),
    *("^", "_", "+", "-", "*", "/", "=", "<", "\\le ", "\\in ", "\\cup ", ",", ";", ":", ".", " "),
    *("\n", "#### ", "The answer is ", "Answer: ", "\\%", "%", "^\\circ", "oo", "sin", "log"),
    *("</think>", "<|im_end|>", "Question:", "\x00", "\x1b[2J", "\u2028", "\u0663", "½", "²", "∞"),
    *("9" * 400, "^{9^{9}}", "e" * 50, "factorial(", "abs(", "floor(", "binom(", "mod ", "||", "'"),
]  # fmt: skip
math = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
texts = math | st.text(max_size=60) | math.map("\\boxed{{{}}}".format)
long_texts = st.builds(lambda text, n: text * n, math, st.sampled_from([50, 2_000]))
golds = texts | leaves | st.lists(texts | leaves, max_size=3) | trees


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2, timeout=TIMEOUT) as grader:
        grader.warm_up()
        yield grader


# Long texts are the point.
@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@fuzz
@given(golds | long_texts, texts | long_texts)
def test_any_completion_gets_a_grade(grader: Grader, gold: Any, completion: str) -> None:
    start = time.monotonic()
    grade = grader.submit(gold, completion).result(timeout=SECONDS)
    assert time.monotonic() - start < SECONDS
    assert grade.reason in REASONS
    assert grade.correct == (grade.reason == "correct")
    assert len(grade.detail) <= 1000
    if grade.correct:
        assert grade.answer


@fuzz
@given(math)
def test_an_answer_without_text_is_never_correct(grader: Grader, gold: str) -> None:
    for completion in ("", " \n", "\\boxed{}", "\\boxed{ }", "I cannot tell"):
        grade = grader.grade(gold, completion)
        assert not grade.correct or gold.strip(" .") == completion.strip(" .")


# Numbers in every writing: the same are equal, and different ones are not.

FORMS = [
    *(
        "{0}/{1}",
        "\\frac{{{0}}}{{{1}}}",
        "\\dfrac{{{0}}}{{{1}}}",
        "${0}/{1}$",
        "x = {0}/{1}",
        "({0})/({1})",
    ),
    *("\\left(\\frac{{{0}}}{{{1}}}\\right)", "{0} \\div {1}", "\\frac{{{0}}}{{{1}}}\\text{{ cm}}"),
    *("2*{0}/(2*{1})", "\\frac{{2 \\cdot {0}}}{{2 \\cdot {1}}}", "{0}/{1} + 1 - 1"),
]
fractions = st.tuples(st.integers(0, 60), st.integers(1, 12))


@settings(fuzz, max_examples=max(25, EXAMPLES))
@given(fractions, fractions, st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_numbers_are_equal_by_value_alone(
    grader: Grader, wanted: tuple[int, int], given: tuple[int, int], gold: str, answer: str
) -> None:
    completion = f"So it is \\boxed{{{answer.format(*given)}}}."
    grade = grader.grade(gold.format(*wanted), completion)
    assert grade.reason in ("correct", "wrong"), grade
    assert grade.correct == (Fraction(*wanted) == Fraction(*given))


# Files of completions, through the command line.

fields = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["a", "b", 1, 1.5, None]) | trees,
        "completion": texts | trees,
        "answer": golds,
        "sample": st.integers(0, 3) | trees,
        "tokens": st.integers(0, 3) | trees,
        "stop": st.none() | texts | trees,
    },
)
whole = st.builds(
    lambda given, base: base | given,
    fields,
    st.fixed_dictionaries(
        {"completion": texts, "answer": st.sampled_from(["4", 4, "x", ["1", 2]])}
    ),
)
lines = (
    st.lists(whole | fields | trees, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)))
    | json_texts
    | st.text(max_size=60)
)
names = st.sampled_from(["own.jsonl", "[/b].jsonl", "[red].json", "a b.jsonl", "own.parquet", "x"])


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit status of a command and the lines of its standard error."""
    capsys.readouterr()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["poweropd", *arguments])
        patch.setattr("sys.path", [*sys.path])  # graders may add to it
        try:
            commands.main()
        except SystemExit as end:
            status = int(end.code or 0)
    return status, capsys.readouterr().err.splitlines()


@settings(fuzz, max_examples=max(10, EXAMPLES // 2))
@given(lines, names, lines | st.none(), lines | st.none())
def test_any_file_of_completions_gives_figures_or_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    name: str,
    problems: str | None,
    other: str | None,
) -> None:
    files = {name: content, "problems.jsonl": problems, "other.json": other}
    written = {
        tmp_path / name: text.encode("utf-8", "surrogatepass")
        for name, text in files.items()
        if text is not None
    }
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)  # a name with a slash
        path.write_bytes(text)
    arguments = ["eval", "--grade", str(tmp_path / name), "--json", str(tmp_path / "figures.json")]
    arguments += ["--benchmark", str(tmp_path / "problems.jsonl")] if problems is not None else []
    arguments += ["--compare", str(tmp_path / "other.json")] if other is not None else []
    status, said = run(arguments, capsys)
    assert status in (0, 1, 2)
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == (status != 0)
    assert all(line.isprintable() and len(line) <= commands.LONGEST_MESSAGE + 10 for line in errors)
    assert status == 0 or said[-1] == errors[0]
    assert {path: path.read_bytes() for path in written} == written


@fuzz
@given(golds | json_texts)
def test_a_gold_is_read_once_and_for_all(value: Any) -> None:
    gold = None
    with suppress(ValueError):
        gold = read_gold(value)
    assert gold is None or gold.strip()


def test_a_gold_of_great_length_equals_only_its_very_text(grader: Grader) -> None:
    gold = "1" + "0" * 30_000
    start = time.process_time()
    assert grader.grade(gold, f"\\boxed{{{gold}}}").reason == "correct"
    assert grader.grade(gold, gold).reason == "correct"
    assert grader.grade(gold, "\\boxed{10}").reason == "unparsed_gold"
    assert read_gold([gold, "1,000"]) == f"{gold}; 1,000"
    assert time.process_time() - start < 2
