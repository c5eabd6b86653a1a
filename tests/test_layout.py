"""The architecture: which room imports which, names, sizes, docstrings, what importing costs."""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "poweropd"

# Room -> the rooms of ours that it may import. `errors` may be imported anywhere.
MAY_IMPORT = {
    "errors": set(),
    "rewards": set(),
    "stops": set(),
    "net": set(),
    "terminal": set(),
    "kernels": set(),
    "grading": set(),
    "embedded": set(),
    # The tables that name choices, no more: see the light import below.
    "config": {
        "evaluation",
        "grading",
        "models",
        "net",
        "objectives",
        "rewards",
        "rollouts",
        "stops",
        "teachers",
    },
    "data": {"config", "embedded", "stops"},
    "objectives": {"data", "kernels", "rewards"},
    "models": {"config", "data", "embedded", "kernels", "objectives", "rewards", "stops"},
    # Tools run in the killable workers of grading.
    "rollouts": {"config", "data", "grading", "models", "net"},
    "teachers": {"config", "data", "models", "net", "rewards", "runs", "stops"},
    "runs": {"config", "data", "embedded", "objectives", "terminal"},
    # A teacher beside the student, or in its place, is judged or sampled as in training.
    "evaluation": {
        *("config", "data", "embedded", "grading", "models", "net", "objectives", "rewards"),
        *("rollouts", "runs", "stops", "teachers", "terminal"),
    },
    "training": {
        *("config", "data", "evaluation", "grading", "kernels", "models", "objectives", "rewards"),
        *("rollouts", "runs", "stops", "teachers", "terminal"),
    },
    "integrations": {"kernels", "net", "rewards"},
    "report": {"config", "evaluation", "rewards", "runs"},
    "tune": {"config", "evaluation", "runs", "sweep", "terminal", "training"},
    # It says what runs will cost as `plan` does, before they start.
    "sweep": {
        *("config", "data", "embedded", "evaluation", "models", "plan", "report", "rewards"),
        *("runs", "teachers", "terminal", "training"),
    },
    # It also looks at prompts, which show tools, and at their golds, to write a first recipe.
    "plan": {
        *("config", "data", "embedded", "grading", "kernels", "models", "rollouts", "runs"),
        *("stops", "terminal"),
    },
}
SEES_EVERYTHING = {"commands", "__main__", "__init__"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Places of this package that a module imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "poweropd":
            names += [f"poweropd.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return {name.split(".")[1] for name in names if name.startswith("poweropd.")}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    if place(path) in SEES_EVERYTHING:
        return
    assert imported(path) - {place(path), "errors"} <= MAY_IMPORT[place(path)]


def test_what_may_be_imported_is_imported() -> None:
    found = {place(path): set[str]() for path in modules()}
    for path in modules():
        found[place(path)] |= imported(path)
    assert {name: allowed - found[name] for name, allowed in MAY_IMPORT.items()} == {
        name: set() for name in MAY_IMPORT
    }


def test_metrics_need_nothing_of_ours() -> None:
    assert imported(PACKAGE / "evaluation" / "metrics.py") <= {"evaluation"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("poweropd.rewards", ["torch", "transformers", "pydantic", "numpy"]),
        ("poweropd.stops", ["torch", "transformers", "pydantic", "numpy"]),
        ("poweropd.kernels", ["transformers", "accelerate", "datasets", "pydantic"]),
        ("poweropd.grading.grader", ["torch", "transformers", "datasets"]),
        ("poweropd.evaluation.metrics", ["torch", "transformers", "datasets"]),
        ("poweropd.evaluation.settings", ["torch", "transformers", "datasets"]),
        ("poweropd.config", ["torch", "transformers", "accelerate", "datasets", "numpy"]),
        ("poweropd.runs.directory", ["torch", "transformers", "pyarrow", "numpy"]),
        ("poweropd.evaluation.benchmarks", ["torch", "transformers", "pydantic", "numpy"]),
        ("poweropd.commands", ["torch", "transformers"]),
    ],
)
def test_a_part_loads_nothing_it_does_not_need(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {absent} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


TREES = {path: ast.parse(path.read_text()) for path in modules()}
Function = ast.FunctionDef | ast.AsyncFunctionDef
# Words with which a docstring begins that end like a verb of the third person, and are none.
NOT_VERBS = {"its", "this", "as", "tokens", "bytes", "seconds", "rows", "names", "values", "always"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_modules_import_each_other() -> None:
    """Imports for types alone count, too; those inside functions do not."""
    known = {module_name(path) for path in TREES}
    graph: dict[str, set[str]] = {}
    for path, tree in TREES.items():
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, Function) for n in ast.walk(f)}
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and id(node) not in inside:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= names & known or {node.module} & known
        graph[module_name(path)] = found - {module_name(path)}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_the_package_can_be_drawn() -> None:
    entries = [p for p in PACKAGE.iterdir() if p.name not in ("__pycache__", "py.typed")]
    # Above 22: `terminal`, which five rooms share; `tune`; `integrations`, for other trainers.
    assert len(entries) <= 25
    files = Counter(path.parent for path in TREES)
    assert max(files.values()) <= 14


def test_each_name_is_defined_once() -> None:
    homes = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, Function | ast.ClassDef):
                homes[node.name].append(module_name(path))
    hooks = {"__getattr__"}  # which Python calls by this name in any module
    assert {n: found for n, found in homes.items() if len(found) > 1 and n not in hooks} == {}


def test_functions_say_what_they_do() -> None:
    docs = [
        text
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, Function) and (text := ast.get_docstring(node))
    ]
    first = [re.match(r"[A-Za-z']*", text)[0].lower() for text in docs]
    verbs = [word for word in first if word.endswith("s") and word not in NOT_VERBS]
    assert len(verbs) >= 0.95 * len(docs)


def test_any_is_rare() -> None:
    texts = [path.read_text() for path in TREES]
    found = sum(len(re.findall(r"\bAny\b", text)) for text in texts)
    assert found <= 7 * sum(len(text.splitlines()) for text in texts) / 1000
