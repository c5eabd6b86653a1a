"""The table of benchmarks, and loading their problems from the Hub or from files."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from poweropd.data.messages import Conversation, is_messages, read_conversation
from poweropd.data.sources import (
    READERS,
    PlacedRows,
    Row,
    column_names,
    find_value,
    hub_rows,
    is_file_name,
    placed_rows,
    value_at,
)
from poweropd.embedded import task
from poweropd.errors import UsageError
from poweropd.evaluation.settings import EvaluationSettings
from poweropd.grading.graders.base import Asked, NamedGrader
from poweropd.grading.graders.mathematics import Mathematics
from poweropd.grading.rules import Rule

MATH = Mathematics()


@dataclass(frozen=True)
class Problem:
    """One problem with its gold answer and the rule that its answers are graded by.

    The problem of a conversation is the user's last message.

    answer: the gold as its grader reads it, which is text but for a few graders.
    row: the columns of the data, which a user's own grader gets.
    """

    id: str
    problem: str
    answer: object
    rule: Rule = field(default_factory=Rule)
    row: Mapping[str, object] = field(default_factory=dict, compare=False)
    conversation: Conversation | None = None  # if the problem is one of messages

    def asked(self, benchmark: str) -> Asked:
        """Returns what the graders get of the problem."""
        place = f"problem {self.id!r} of {benchmark}"
        return Asked(self.answer, self.row, self.rule, place)


@dataclass(frozen=True)
class ProblemSet:
    """The problems of a benchmark, and how completions of them are sampled and graded."""

    problems: Sequence[Problem]
    settings: EvaluationSettings
    grader: NamedGrader = MATH


@dataclass(frozen=True)
class Benchmark:
    """The place of a benchmark's data, and how it is read and graded.

    dataset, config, split, revision: names on the Hub; dataset is None for the embedded task and
        for files, of which a folder may have several splits.
    problem, answer, id: names of columns; rows are numbered if `id` is None or absent.
    rule: how answers are compared; `tolerances` holds the absolute tolerance of single problems.
    """

    dataset: str | None
    config: str | None = None
    split: str = "test"
    problem: str = "problem"
    answer: str = "answer"
    id: str | None = None
    rule: Rule = field(default_factory=Rule)
    tolerances: Mapping[str, float] = field(default_factory=dict)
    revision: str | None = None

    def rows(self, files: str) -> PlacedRows:
        """Returns the places and rows of the Hub dataset or, if there is none, of files."""
        if self.dataset is None:
            return placed_rows(files, self.split, self.config)
        return hub_rows(self.dataset, self.split, self.config, self.revision)

    def rule_for(self, problem_id: str) -> Rule:
        """Returns the rule for the answers to one problem."""
        number = problem_id.rpartition("-")[2]  # local files write olympiadbench-2592
        tolerance = self.tolerances.get(number)
        return self.rule if tolerance is None else replace(self.rule, absolute_tolerance=tolerance)


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark("openai/gsm8k", config="main", problem="question"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", id="unique_id"),
    "amc23": Benchmark("math-ai/amc23", problem="question", id="id"),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", split="train", id="id"),
    "aime25": Benchmark("math-ai/aime25", id="id"),
    "minerva": Benchmark(
        "math-ai/minervamath",
        problem="question",
        # Answers differ in the third digit by physical constants and rounding.
        rule=Rule(relative_tolerance=1e-2),
    ),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench",
        config="OE_TO_maths_en_COMP",
        split="train",
        problem="question",
        answer="final_answer",
        id="id",
        tolerances={"2592": 1e-1},
    ),
    "embedded": Benchmark(None),
}
EMBEDDED_PROBLEMS = 256


def load_benchmark(
    name: str | Path,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    *,
    problem_column: str | None = None,
    answer_column: str | None = None,
    config: str | None = None,
    split: str | None = None,
    file: str | None = None,
    dataset: str | None = None,
    grader: NamedGrader = MATH,
    revision: str | None = None,
) -> list[Problem]:
    """Returns the problems of a benchmark, or the first `limit` of them.

    name: a key of BENCHMARKS, a file, folder or glob of files, or a Hub dataset (owner/name).
    data_dir: a folder with NAME.jsonl (id, problem, answer), read instead of the Hub.
    problem_column, answer_column, config, split, revision: for the user's own files or dataset;
        dots in the name of a column lead into nested ones.
    file, dataset: where the problems are, if `name` does not say it.
    grader: reads the golds.

    Raises UsageError for an unknown name, a file that cannot be used, or no problems at all.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"expected a limit of at least 1 problem, got {limit}")
    name = str(name)
    if name == "embedded":
        sums = task.problems("evaluation", limit or EMBEDDED_PROBLEMS)
        rows = ({"id": t.id, "problem": t.problem, "answer": t.answer} for t in sums)
        places = ((f"embedded:{row['id']}", row) for row in rows)
        return list(_from_rows(places, Benchmark(None, id="id"), grader))
    path = str(Path(data_dir or ".") / f"{name}.jsonl")
    local = data_dir is not None and (name in BENCHMARKS or Path(path).is_file())
    if local and not (file or dataset):
        known = BENCHMARKS.get(name, Benchmark(None))
        benchmark = Benchmark(None, id="id", rule=known.rule, tolerances=known.tolerances)
    else:
        path = file or name
        known = Benchmark(dataset, id="id") if file or dataset else _benchmark(name)
        benchmark = replace(
            known,
            problem=problem_column or known.problem,
            answer=answer_column or known.answer,
            config=config or known.config,
            split=split or known.split,
            revision=revision or known.revision,
        )
    problems = list(islice(_from_rows(benchmark.rows(path), benchmark, grader), limit))
    if not problems:
        raise UsageError(f"{name}: expected at least one problem, got none; check its content")
    return problems


def short_name(name: str) -> str:
    """Returns the name for tables and files: the stem of files, owner--name of a dataset."""
    if name in BENCHMARKS or not is_file_name(name):
        return name.replace("/", "--")
    path = Path(name.removesuffix(".gz"))
    words = (re.sub(r"[^\w.-]+", "-", text).strip("-.") for text in (path.stem, path.parent.name))
    return next((word for word in words if word), "files")


def _benchmark(name: str) -> Benchmark:
    """Returns a known benchmark, a user's file or a Hub dataset. Raises UsageError for others."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if is_file_name(name):
        return Benchmark(None, id="id")
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return Benchmark(name, id="id")
    raise UsageError(
        f"unknown benchmark {name!r}: expected one of {', '.join(BENCHMARKS)}, a file of "
        f"{', '.join(READERS)}, a folder or glob of them, or a Hub dataset (owner/name)"
    )


def _from_rows(
    rows: Iterable[tuple[str, Mapping[str, object]]], benchmark: Benchmark, grader: NamedGrader
) -> Iterator[Problem]:
    """Yields problems, numbered if they have no id. Raises UsageError if an id comes twice."""
    places: dict[str, str] = {}
    for number, (place, row) in enumerate(rows):
        given = _field(row, benchmark.problem, place)
        messages = read_conversation(row, benchmark.problem, place) if is_messages(given) else None
        problem = (str(given or "") if messages is None else messages.last_user_text).strip()
        if not problem:
            raise UsageError(
                f"{place}: expected text in {benchmark.problem!r}, got nothing; "
                "fill it or drop the line"
            )
        answer = gold_of(row, benchmark.answer, place, grader)
        given = row.get(benchmark.id) if benchmark.id is not None else None
        identifier = str(number if given is None else given)
        if identifier in places:
            raise UsageError(
                f"{place}: expected ids that differ, got {identifier!r} again "
                f"(first at {places[identifier]}); make them differ"
            )
        places[identifier] = place
        question = grader.question(problem, row)
        rule = benchmark.rule_for(identifier)
        asked = None if messages is None else messages.cut().with_ending(question[len(problem) :])
        yield Problem(identifier, question, answer, rule, row, asked)


def gold_of(
    row: Mapping[str, object], column: str, place: str, grader: NamedGrader = MATH
) -> object:
    """Returns the gold answer of a row, or whatever is there if the grader needs none.

    Raises UsageError, which names the place and the column.
    """
    if not grader.needs_gold:
        return find_value(row, column)
    value = _field(row, column, place)
    try:
        return grader.gold(value, row)
    except ValueError as error:
        expected = grader.expected.format(repr(column))
        raise UsageError(
            f"{place}: expected {expected}, {error}; correct it or drop the line"
        ) from None


def _field(row: Row, column: str, place: str) -> object:
    try:
        return value_at(row, column)
    except KeyError:
        raise UsageError(
            f"{place}: expected a field {column!r}, got {column_names(row)}; name the right columns"
        ) from None
