"""The benchmarks, in one table, and how problems are loaded from the Hub or from files."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from poweropd.data.prompts import hub_rows, json_lines
from poweropd.errors import UsageError
from poweropd.grading import answers
from poweropd.grading.rules import Rule

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One problem with its gold answer, and the rule its answers are graded by."""

    id: str
    problem: str
    answer: str
    rule: Rule = field(default_factory=Rule)


def _as_written(value: Any) -> str:
    """The column's text; a list of answers becomes one, separated by commas."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_as_written, value))
    return "" if value is None else str(value).strip()


def _after_hashes(value: Any) -> str:
    """GSM8K's answer, after the #### that ends its worked solution."""
    return _as_written(value).rpartition("####")[2].strip()


def _last_box(value: Any) -> str:
    """The content of a worked solution's last box, or the text where it has none."""
    text = _as_written(value)
    return answers.boxed(text) or text


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lives and how it is read and graded.

    dataset, config, split: on the Hub; dataset is None for the embedded task.
    problem, answer, id: column names; rows are numbered where `id` is None or absent.
    read_answer: from the answer column's value to the gold answer.
    rule: how answers are compared; `tolerances` states the absolute tolerance of single problems.
    """

    dataset: str | None
    config: str | None = None
    split: str = "test"
    problem: str = "problem"
    answer: str = "answer"
    id: str | None = None
    read_answer: Callable[[Any], str] = _as_written
    rule: Rule = field(default_factory=Rule)
    tolerances: Mapping[str, float] = field(default_factory=dict)

    def rule_for(self, problem_id: str) -> Rule:
        number = problem_id.rpartition("-")[2]  # local files write olympiadbench-2592
        tolerance = self.tolerances.get(number)
        return self.rule if tolerance is None else replace(self.rule, absolute_tolerance=tolerance)


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        "openai/gsm8k", config="main", problem="question", read_answer=_after_hashes
    ),
    "math500": Benchmark("HuggingFaceH4/MATH-500", id="unique_id"),
    "amc23": Benchmark("math-ai/amc23", problem="question", id="id"),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", split="train", id="id"),
    "aime25": Benchmark("math-ai/aime25", id="id"),
    "minerva": Benchmark(
        "math-ai/minervamath",
        problem="question",
        read_answer=_last_box,
        # Physical constants and roundings differ in the third digit.
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
) -> list[Problem]:
    """The problems of a benchmark, the first `limit` of them.

    name: a key of BENCHMARKS, the path of a JSONL file, or a Hub dataset (owner/name).
    data_dir: a folder with NAME.jsonl (id, problem, answer), read instead of the Hub.
    problem_column, answer_column, config, split: for a file or dataset of one's own.

    Raises UsageError for an unknown name, a file that cannot be used, or no problems at all.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"expected a limit of at least 1 problem, got {limit}")
    name = str(name)
    benchmark = BENCHMARKS.get(name) or _own(name, data_dir)
    benchmark = replace(
        benchmark,
        problem=problem_column or benchmark.problem,
        answer=answer_column or benchmark.answer,
        config=config or benchmark.config,
        split=split or benchmark.split,
    )
    problems = list(islice(_problems(name, benchmark, data_dir, limit), limit))
    if not problems:
        raise UsageError(f"{name}: expected at least one problem, got none; check its content")
    return problems


def short_name(name: str) -> str:
    """Its name in tables and file names: a file's stem, owner--name of a dataset."""
    return Path(name).stem if Path(name).is_file() else name.replace("/", "--")


def _own(name: str, data_dir: str | Path | None) -> Benchmark:
    """A user's file or Hub dataset; anything else is a misspelt benchmark."""
    if data_dir is not None and (Path(data_dir) / f"{name}.jsonl").is_file():
        return Benchmark(None, id="id")
    if name.endswith((".jsonl", ".json")) or Path(name).is_file():
        return Benchmark(None, id="id", read_answer=_own_answer)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return Benchmark(name, id="id", read_answer=_own_answer)
    raise UsageError(
        f"unknown benchmark {name!r}: expected one of {', '.join(BENCHMARKS)}, a JSONL file, "
        "or a Hub dataset (owner/name)"
    )


def _own_answer(value: Any) -> str:
    """An answer of unknown making: GSM8K's way, a worked solution's box, or the plain text."""
    text = _as_written(value)
    return _after_hashes(text) if "####" in text else _last_box(text)


def _problems(
    name: str, benchmark: Benchmark, data_dir: str | Path | None, limit: int | None
) -> Iterator[Problem]:
    if name == "embedded":
        return _embedded(limit or EMBEDDED_PROBLEMS)
    path = Path(data_dir or ".") / f"{name}.jsonl"
    if data_dir is not None and (name in BENCHMARKS or path.is_file()):
        local = replace(benchmark, problem="problem", answer="answer", id="id")
        return _from_rows(json_lines(path), replace(local, read_answer=_as_written))
    if benchmark.dataset is None:
        return _from_rows(json_lines(Path(name)), benchmark)
    rows = hub_rows(benchmark.dataset, benchmark.split, benchmark.config)
    return _from_rows(rows, benchmark)


def _embedded(count: int) -> Iterator[Problem]:
    from poweropd.embedded import task

    for problem in task.problems("evaluation", count):
        yield Problem(problem.id, problem.problem, problem.answer)


def _from_rows(rows: Iterable[tuple[str, Row]], benchmark: Benchmark) -> Iterator[Problem]:
    """Problems with ids that are each seen once; rows without an id are numbered."""
    places: dict[str, str] = {}
    for number, (place, row) in enumerate(rows):
        problem = _as_written(_value(row, benchmark.problem, place))
        answer = benchmark.read_answer(_value(row, benchmark.answer, place))
        for column, text in ((benchmark.problem, problem), (benchmark.answer, answer)):
            if not text:
                raise UsageError(
                    f"{place}: expected text in {column!r}, got nothing; fill it or drop the line"
                )
        given = row.get(benchmark.id) if benchmark.id is not None else None
        identifier = str(number if given is None else given)
        if identifier in places:
            raise UsageError(
                f"{place}: expected ids that differ, got {identifier!r} again "
                f"(first at {places[identifier]}); make them differ"
            )
        places[identifier] = place
        yield Problem(identifier, problem, answer, benchmark.rule_for(identifier))


def _value(row: Row, column: str, place: str) -> Any:
    if column not in row:
        raise UsageError(
            f"{place}: expected a field {column!r}, got {', '.join(map(repr, row)) or 'none'}; "
            "name the right columns"
        )
    return row[column]
