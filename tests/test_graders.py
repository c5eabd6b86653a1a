"""The table of graders: what each finds in a completion, what it takes as gold, what it refuses."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from poweropd import Config, Trainer, commands
from poweropd.errors import RunError, UsageError
from poweropd.evaluation.benchmarks import Problem, ProblemSet, load_benchmark
from poweropd.evaluation.metrics import summarize
from poweropd.evaluation.runner import Evaluation, Subject, load_subject, run_benchmarks
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.grading.grader import Grade, Grader
from poweropd.grading.graders import GRADERS, name_problem
from poweropd.grading.graders.base import Asked, create_grader
from poweropd.runs.card import write_card

Row = dict[str, Any]
FOUR = {"choices": ["Rome", "Paris", "Oslo", "Bern"]}
SETTINGS = EvaluationSettings(n=2, max_new_tokens=6)


@pytest.fixture(scope="module")
def workers() -> Iterator[Grader]:
    with Grader(workers=1, timeout=10.0) as made:
        yield made


@pytest.fixture(scope="module")
def subject(student_dir: Path) -> Subject:
    return load_subject(str(student_dir), "float32")


def graded(workers: Grader, name: str, gold: object, completion: str, row: Row) -> Grade:
    grader = create_grader("--grader", name)
    asked = Asked(grader.gold(gold, row) if grader.needs_gold else gold, row)
    return grader.submit(workers, asked, completion).result(timeout=30)


# What is found.

EXACT = [
    ("refund", "correct"),
    ("Refund.", "correct"),
    ("**Refund**", "correct"),
    ("`refund`", "correct"),
    ("“Refund.”", "correct"),
    ("Answer: refund", "correct"),
    ("**Answer:** Refund", "correct"),
    ("**Answer: refund**", "correct"),
    ("It was broken.\n\n**Answer**: refund", "correct"),
    ("It was broken.\n\n### Answer\n\nrefund", "correct"),
    ("It was broken. The answer is **refund**.", "correct"),
    ("The final answer is: refund because it broke.", "correct"),
    ("\\boxed{\\text{refund}}", "correct"),
    ("<think>billing\nor else\n</think>\nrefund", "correct"),
    ("Answer: billing\nNo, wait.\nAnswer: refund", "correct"),
    ("Answer: refund\nNo, wait.\nAnswer: billing", "wrong"),
    ("billing", "wrong"),
    ("no refund", "wrong"),
    ("Answer: refund or billing", "wrong"),
    ("It could be\nanything.", "no_answer"),
    ("", "no_answer"),
]


@pytest.mark.parametrize(("completion", "reason"), EXACT)
def test_exact(completion: str, reason: str, workers: Grader) -> None:
    grade = graded(workers, "exact", "Refund", completion, {})
    assert (grade.reason, grade.correct, grade.score) == (
        reason,
        reason == "correct",
        float(reason == "correct"),
    )
    assert (grade.answer is None) == (reason == "no_answer")


CHOICE = [
    ("B", "B"),
    ("b", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("**B**", "B"),
    ("B) Paris", "B"),
    ("**Answer:** B", "B"),
    ("Answer: B. It is Paris, not Rome.", "B"),
    ("The answer is (B).", "B"),
    ("The answer is B because of the Seine", "B"),
    ("The correct option is B", "B"),
    ("Option B is correct.", "B"),
    ("$\\boxed{\\text{B}}$", "B"),
    ("B. Paris\n\nIt lies on the Seine.", "B"),
    ("Paris", "B"),
    ("The answer is Paris.", "B"),
    ("Answer: D", "D"),
    ("Answer: A or B", "A or B"),
    ("A. Rome\nB. Paris\nC. Oslo", None),
    ("A man went to Paris", None),
    ("I think so, e.g. there", None),
    ("", None),
]


@pytest.mark.parametrize(("completion", "answer"), CHOICE)
def test_choice(completion: str, answer: str | None, workers: Grader) -> None:
    grade = graded(workers, "choice", 1, completion, FOUR)
    assert grade.answer == answer
    assert grade.correct == (answer == "B")


ROWS = [
    ("B", {}, "B"),
    ("(c)", {}, "C"),
    ("2", {"choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}}, "B"),  # ARC
    ("3", {"endings": ["a b", "c", "d", "e"]}, "D"),  # HellaSwag
    (2, FOUR, "C"),  # MMLU
    ([2], FOUR, "C"),
    ("Paris", FOUR, "B"),
    ("4", {"options": ["1", "2", "4", "3"]}, "C"),  # the text of an option, not its number
    ("D", {"A": "1", "B": "2", "C": "3", "D": "4"}, "D"),  # C-Eval
    ("b", {"option_a": "1", "option_b": "2"}, "B"),  # Global-MMLU
    ("C", {"options": {"A": "x", "B": "y", "C": "z"}}, "C"),  # MedQA
    ("B", {"options": ["A)21", "B)22"]}, "B"),  # AQuA
]


@pytest.mark.parametrize(("gold", "row", "letter"), ROWS)
def test_golds_of_choices(gold: object, row: Row, letter: str) -> None:
    assert create_grader("--grader", "choice").gold(gold, row) == letter


def test_options_are_shown_unless_the_problem_shows_them() -> None:
    choice = create_grader("--grader", "choice:names")
    row = {"names": ["Rome", "Paris"]}
    assert choice.question("Which?", row) == "Which?\nA. Rome\nB. Paris"
    assert choice.question("Rome (A) or Paris (B)?", row) == "Rome (A) or Paris (B)?"


JSON = [
    ("json", '{"a": 1}', '{"a": 1.0}', "correct"),
    ("json", {"a": [1, None]}, 'Sure:\n```json\n{"a": [1, null]}\n```\nDone.', "correct"),
    ("json", {"a": 1}, 'First {"a": 2}, then {"a": 1}.', "correct"),
    ("json", {"a": True}, '{"a": 1}', "wrong"),
    ("json", {"a": 1}, '{"a": 1, "b": 2}', "wrong"),
    ("json", {"a": 1}, "{'a': 1}", "no_answer"),
    ("json", {"a": 1}, '{"a": 1', "no_answer"),
    ("json", [1], "[" * 100_000, "no_answer"),
    ("json", [1], "1" * 10_000, "no_answer"),
    ("json:a", {"a": 1, "b": 2}, '{"a": 1, "c": 3}', "correct"),
    ("json:a,b", {"a": 1, "b": 2}, '{"a": 1, "b": 3}', "wrong"),
    ("json:a", {"a": 1}, "[1]", "wrong"),
]


@pytest.mark.parametrize(("name", "gold", "completion", "reason"), JSON)
def test_json(name: str, gold: object, completion: str, reason: str, workers: Grader) -> None:
    assert graded(workers, name, gold, completion, {}).reason == reason


def test_each_key_of_json_has_a_score(workers: Grader) -> None:
    grade = graded(workers, "json:a,b", {"a": 1, "b": 2}, '{"a": 1, "b": 3}', {})
    assert grade.scores == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    ("name", "gold", "completion", "reason", "answer"),
    [
        ("contains", "no", "I know", "wrong", ""),
        ("contains", ["Rome", "paris"], "It is **Paris**, yes.", "correct", "paris"),
        ("contains", "C++", "In c++ it is", "correct", "C++"),
        ("contains", "x", "", "no_answer", None),
        ("regex:Category: (\\w+)", "refund", "Category: a\nCategory: Refund", "correct", "Refund"),
        ("regex:(?P<other>C): (?P<answer>\\w+)", "refund", "C: billing", "wrong", "billing"),
        ("regex:Category: (\\w+)", "refund", "refund", "no_answer", None),
        ("regex:^\\d+$", None, "123", "correct", "123"),
        ("regex:^\\d+$", None, "a", "wrong", ""),
        ("math", "1/2", "so \\boxed{0.5}", "correct", "0.5"),
    ],
)
def test_the_others(
    name: str, gold: object, completion: str, reason: str, answer: str | None, workers: Grader
) -> None:
    grade = graded(workers, name, gold, completion, {})
    assert (grade.reason, grade.answer) == (reason, answer)


def test_a_catastrophic_pattern_ends_at_the_time_limit() -> None:
    with Grader(workers=1, timeout=0.5) as workers:
        workers.warm_up()
        start = time.monotonic()
        grade = graded(workers, "regex:(a+)+$", "a", "a" * 40 + "b", {})
        assert time.monotonic() - start < 3
        assert (grade.reason, grade.correct) == ("timeout", False)
        assert graded(workers, "regex:(a+)+$", "aa", "aa", {}).correct


@pytest.mark.parametrize("name", ["exact", "contains", "choice", "json", "json:a"])
def test_searches_are_linear(name: str, workers: Grader) -> None:
    gold, row = ({"a": 1}, {}) if name.startswith("json") else ("B", FOUR)
    for text in ("answer ", "**", "_", "option ", "{", "[", "A", "(A)\n", "```json\n", "Answer:\n"):
        start = time.process_time()
        graded(workers, name, gold, text * (100_000 // len(text)), row)
        assert time.process_time() - start < 3, text


# Golds and names that are refused, in one line.


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "exact",
            {"answer": None},
            "expected text in 'answer', a number, or a list of the .* noth",
        ),
        ("exact", {"answer": {}}, "got {}, which is dict"),
        ("exact", {"answer": []}, "got an empty list"),
        ("exact", {"answer": '"'}, "got '\"'"),
        ("contains", {"answer": float("nan")}, "got nan"),
        (
            "choice",
            {"answer": "word"},
            "expected a letter in 'answer', or the number .* got 'word'",
        ),
        ("choice", {"answer": 7, **FOUR}, "got 7 and 4 options"),
        ("choice", {"answer": "Lyon", **FOUR}, "got 'Lyon' and 4 options"),
        ("choice:names", {"answer": 1}, "list of 2 to 26 options in column 'names': got none"),
        ("json", {"answer": "not"}, "expected JSON in 'answer', .* no JSON: 'not'"),
        ("json:a,b", {"answer": {"a": 1}}, "got a without b"),
        ("json:a", {"answer": [1]}, r"got \[1\], which has no keys"),
        ("exact", {"label": "x"}, "expected a field 'answer', got problem, label"),
    ],
)
def test_golds_that_state_nothing_name_the_line(
    name: str, row: Row, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"problem": "?", **row}) + "\n")
    with pytest.raises(UsageError, match=f"own.jsonl:1: .*{message}") as caught:
        load_benchmark(path, grader=create_grader("--grader", name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exactly", "expected one of math, exact, contains, choice, choice:COLUMN, regex:PATTERN"),
        ("", "expected one of math"),
        ("math:x", "expected math alone, for it takes no argument"),
        ("regex", "expected regex:PATTERN, got no pattern"),
        ("regex:(", "expected a regular expression, and this is none: missing ), unterminated"),
        ("json:", "expected something behind the colon: json:KEY,KEY"),
        ("no.such.module:f", "cannot import no.such.module:f: ModuleNotFoundError"),
        (f"{__name__}:nothing", "has no 'nothing'"),
        (f"{__name__}:SETTINGS", "expected a function"),
    ],
)
def test_names_of_no_grader_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--grader: .*{re.escape(message)}") as caught:
        create_grader("--grader", name)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_refused_before_anything_is_imported(recipe: Callable[..., Config]) -> None:
    own = {"every": 1, "benchmarks": ["embedded"]}
    for section, key in (
        ({**own, "grader": "regex:("}, "evaluate.grader: expected a regular expression"),
        ({**own, "grader": "exactly"}, "evaluate.grader: expected one of math, exact"),
        ({**own, "benchmarks": [{"file": "x", "dataset": "y"}]}, "expected a file or a dataset"),
        ({**own, "benchmarks": [{"grader": "exact"}]}, "expected a name, a file or a dataset"),
        ({**own, "benchmarks": [{"name": "a/b"}]}, "benchmarks.0.name: expected letters, digits"),
        ({**own, "benchmarks": [{"name": "a", "grader": "json:"}]}, "0.grader: expected something"),
        ({**own, "benchmarks": [{"name": "a", "column": "q"}]}, "column: unknown key"),
    ):
        with pytest.raises(UsageError, match=re.escape(key)):
            recipe(evaluate=section)


def test_every_grader_of_the_table_can_be_made() -> None:
    arguments = {"required": ":x", "optional": "", "none": ""}
    for name, facts in GRADERS.items():
        made = create_grader("--grader", name + arguments[facts.needs])
        assert "{}" in made.expected
        assert name_problem(name + arguments[facts.needs]) is None


# The user's own function.


def length(row: Mapping[str, Any], completion: str) -> dict[str, float]:
    return {"short": 0.25, "score": 0.5 * (row["problem"] != ""), "tokens": len(completion)}


def first_is_main(row: Mapping[str, Any], completion: str) -> dict[str, Any]:
    import numpy as np

    return {"accuracy": np.bool_(True), "style": np.float32(0.5)}


def raises(row: Mapping[str, Any], completion: str) -> float:
    return float(row["no such\ncolumn"])


def undefined(row: Mapping[str, Any], completion: str) -> float:
    return float("nan")


def says(row: Mapping[str, Any], completion: str) -> Any:
    return "1.0"


def empty(row: Mapping[str, Any], completion: str) -> Any:
    return {}


def half(row: Mapping[str, Any], completion: str) -> dict[str, Any]:
    return {"score": 1, "style": None}


def takes_one(completion: str) -> float:
    return 1.0


def changes(row: Mapping[str, Any], completion: str) -> dict[str, float]:
    return {"score": 1.0, **({"more": 1.0} if completion == "2" else {})}


def test_a_function_gives_a_score_and_further_ones(workers: Grader) -> None:
    grade = graded(workers, f"{__name__}:length", None, "abc", {"problem": "?"})
    assert (grade.score, grade.correct, grade.scores) == (0.5, False, {"short": 0.25, "tokens": 3})
    grade = graded(workers, f"{__name__}:first_is_main", None, "abc", {})
    assert (grade.score, grade.correct, grade.scores) == (1.0, True, {"style": 0.5})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "it raised KeyError: 'no such\\\\ncolumn' for problem 'a' of own"),
        ("undefined", "expected a finite number, got nan for problem 'a' of own"),
        ("says", "expected a finite number, got '1.0' for"),
        ("empty", "expected at least one number, got {} for"),
        ("half", "expected a finite number as 'style', got None for"),
        ("takes_one", "it raised TypeError: takes_one\\(\\) takes 1 positional"),
    ],
)
def test_a_function_that_fails_ends_in_one_line_and_what_was_graded_is_kept(
    name: str, message: str, subject: Subject, tmp_path: Path
) -> None:
    settings = EvaluationSettings(n=1, max_new_tokens=4, grader=f"{__name__}:{name}")
    own = Problem("a", "1+1", None, row={"problem": "1+1"})
    asked = {"own": ProblemSet([own], settings, create_grader("--grader", settings.grader))}
    with pytest.raises(RunError, match=f"{name}: {message}") as caught:
        run_benchmarks(subject, asked, tmp_path, progress=False)
    assert "\n" not in str(caught.value)


def test_scores_must_be_the_same_for_all(workers: Grader) -> None:
    grader = create_grader("--grader", f"{__name__}:changes")
    assert grader.submit(workers, Asked(None, {}), "1").result().correct
    with pytest.raises(RunError, match="expected the scores score, as for the first completion, g"):
        grader.submit(workers, Asked(None, {}), "2")


# Evaluations.


def test_scores_become_figures(subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}+1"}) + "\n" for i in range(3)))
    grader = create_grader("--grader", f"{__name__}:length")
    settings = EvaluationSettings(n=2, max_new_tokens=6, grader=f"{__name__}:length")
    asked = {"own": ProblemSet(load_benchmark(path, grader=grader), settings, grader)}
    rows = run_benchmarks(subject, asked, tmp_path / "out", progress=False)["own"].rows
    summary = summarize(rows, n=2)
    assert {row["score"] for row in rows} == {0.5}
    assert (summary.avg_at_k.mean, summary.pass_at_k.mean, summary.maj_at_k.mean) == (0.5, 0, 0)
    assert summary.scores["short"].mean == 0.25
    assert summary.scores["tokens"].mean == pytest.approx(
        sum(len(row["completion"]) for row in rows) / len(rows)
    )
    assert (summary.solved["0"], summary.correct["0"]) == (0.5, 0.0)
    assert summary.no_answer_fraction.mean == 0


def test_settings_know_the_grader_and_those_without_one_are_math(
    subject: Subject, workers: Grader, tmp_path: Path
) -> None:
    own = [Problem("a", "1+1", "2")]
    Evaluation("own", own, SETTINGS, tmp_path, "model").run(subject, workers, progress=False)
    path = tmp_path / "own.settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("grader") == "math"
    path.write_text(json.dumps(settings))
    lines = (tmp_path / "own.jsonl").read_text().splitlines()
    old = [{k: v for k, v in json.loads(line).items() if k != "score"} for line in lines]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    again = Evaluation("own", own, SETTINGS, tmp_path, "model")
    assert again.run(subject, workers, progress=False).problems == 1
    exact = EvaluationSettings(n=2, max_new_tokens=6, grader="exact")
    with pytest.raises(UsageError, match="grader: 'math' != 'exact'"):
        Evaluation("own", own, exact, tmp_path, "model")


def run_eval(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["poweropd", "eval", *arguments])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    return int(stopped.value.code or 0)


def test_completions_from_elsewhere_and_a_grader_that_finds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, figures = tmp_path / "theirs.jsonl", tmp_path / "figures.json"
    texts = ["refund", "Well.\nWho knows [red].", "a\nb", "c\nd", "e\nf"]
    lines = [{"id": i, "label": "refund", "completion": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--grader", "exact", "--answer", "label", "--json", str(figures)]
    assert run_eval(["--grade", str(path), *options], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "theirs: the grader finds no answer in 4 of 5 completions" in shown
    assert "'Well.\\nWho knows [red].'" in shown
    found = json.loads(figures.read_text())
    assert found["results"]["theirs"]["unanswered"] == texts[1:4]
    assert [grade["score"] for grade in found["grades"]] == [1.0, 0, 0, 0, 0]
    assert "completion" not in found["grades"][0]
    assert run_eval(["--grade", str(path), "--grader", "regex:("], monkeypatch) == 2
    assert run_eval(["--grade", str(path), "--grader", f"{__name__}:undefined"], monkeypatch) == 1
    assert "expected a finite number, got nan for problem '0' of" in capsys.readouterr().err


def test_benchmarks_of_a_recipe_have_columns_graders_and_numbers_of_their_own(
    recipe: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "tickets.jsonl"
    rows = [{"text": f"{i}+1", "label": "refund", "choices": ["x", "y"]} for i in range(3)]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmarks = [
        {"file": str(own), "problem": "text", "answer": "label", "n": 2},
        {"name": "json", "file": str(own), "problem": "text", "grader": "json", "answer": "label"},
        {"name": "embedded", "grader": f"{__name__}:length", "limit": 2, "instruction": "Go."},
    ]
    section = {"every": 1, "benchmarks": benchmarks, "grader": "exact", "max_new_tokens": 4}
    keys = {"train.steps": 2, "train.prompts_per_step": 2, "evaluate": section}
    with pytest.raises(UsageError, match=r"tickets.jsonl:1: expected JSON in 'label'"):
        Trainer(recipe(**keys), progress=False)
    del benchmarks[1]["answer"]
    with pytest.raises(UsageError, match=r"tickets.jsonl:1: expected a field 'answer'"):
        Trainer(recipe(**keys), progress=False)
    benchmarks[1] = {"name": "tickets", "file": str(own), "problem": "text", "answer": "label"}
    with pytest.raises(UsageError, match="two are called 'tickets'"):
        Trainer(recipe(**keys), progress=False)
    benchmarks[1] |= {"name": "pattern", "grader": "regex:Label: (.+)"}
    trainer = Trainer(recipe(**keys), progress=False)
    trainer.train()
    results = trainer.run.evaluation(2)
    assert {name: one["n"] for name, one in results.items()} == {
        "tickets": 2,
        "pattern": 1,
        "embedded": 1,
    }
    assert len(results["pattern"]["unanswered"]) == 3
    told = [r.message for r in caplog.records if "pattern: the grader finds no" in r.message]
    assert len(told) == 1  # though it was evaluated twice
    metrics = trainer.run.metrics()[-1]
    assert metrics["eval/embedded/avg_at_k"] == 0.5
    assert metrics["eval/embedded/scores/short"] == 0.25
    prompt = (trainer.run.evaluation_folder(2) / "embedded.settings.json").read_text()
    assert json.loads(prompt)["instruction"] == "Go."
    write_card(tmp_path, trainer.config, 2)
    card = (tmp_path / "README.md").read_text()
    assert "| tickets (k = 2) | 3 |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(("name", "reward"), [("exact", 0.5), ("grader", 0.0)])
def test_any_grader_is_a_task_reward(
    name: str, reward: float, recipe: Callable[..., Config], tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"problem": "2+2", "label": "12"}) + "\n")
    section = {"name": name, "weight": 0.5, "answer_column": "label"}
    keys = {"rollout.task_reward": section, "data.prompts": str(path)}
    trainer = Trainer(recipe(**keys, **{"train.prompts_per_step": 1}), progress=False)
    completion = "3\nAnswer: 12" if name == "exact" else "3\nAnswer: 13"
    ids = trainer.inputs.tokenizer(completion)["input_ids"]
    rollouts = list(trainer.sample(0))
    given = [
        replace(r, completion_ids=ids, sampling_log_probs=[-1.0] * len(ids), stopped=False)
        for r in rollouts
    ]
    trainer.task_rewards.submit(given[0])
    examples = trainer.scored(given)
    assert {e.task_reward for e in examples} == {reward}


def test_task_rewards_read_golds_by_their_grader(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"problem": "2+2", "answer": "word"}) + "\n")
    for name, message in (
        ("choice", "answer_column: expected a letter in column 'answer' of row 0, .* got 'word'"),
        ("json", "answer_column: expected JSON in column 'answer' of row 0"),
    ):
        keys = {"rollout.task_reward": {"name": name}, "data.prompts": str(path)}
        with pytest.raises(UsageError, match=message):
            Trainer(recipe(**keys), progress=False)
    with pytest.raises(UsageError, match=r"rollout.task_reward.name: expected a regular expressi"):
        recipe(**{"rollout.task_reward": {"name": "regex:("}})
