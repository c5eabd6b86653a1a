"""The architecture: who imports whom, how long files are, what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "poweropd"

# Module (or package) -> what of ours it may import. `errors` may be imported anywhere.
MAY_IMPORT = {
    "errors": set(),
    "access": set(),
    "rewards": set(),
    "stops": set(),
    "costs": {"kernels"},
    "accounting": {"costs", "batching", "models"},
    "plan": {"accounting", "config", "costs", "data", "models", "records", "sections", "stops"},
    "progress": set(),
    "embedded": set(),
    "kernels": set(),
    "sharding": set(),
    "data": {"embedded"},
    "batching": {"stops"},
    "recipe_file": set(),
    "contradictions": {"config"},  # for its type alone
    "sections": {"access", "evaluation", "rewards"},
    "config": {"contradictions", "rewards", "recipe_file", "sections"},
    "records": {"config"},
    "checkpoint": {"records"},
    "selection": {"batching"},
    "objectives": {"rewards", "batching", "kernels", "selection"},
    "models": {"sections", "objectives", "kernels", "batching", "embedded", "sharding"},
    "attention": {"models", "batching"},
    "rollouts": {"access", "batching"},
    "teachers": {
        *("access", "batching", "models", "records", "rewards", "sections", "stops"),
    },
    "diagnostics": {"models", "kernels", "objectives", "batching", "rewards"},
    "update": {"sections", "models", "objectives", "batching", "rewards", "sharding"},
    "evaluation": {"rollouts", "batching", "models", "data", "embedded", "records", "stops"},
    "report": {"records", "rewards", "recipe_file"},
    "validation": {"sections", "config", "evaluation", "records"},
    "signals": set(),
    "trackers": set(),
    "card": {"sections", "config", "records"},
    "task_reward": {"sections", "batching", "data", "evaluation", "rewards"},
    "engines": {"attention", "batching", "config", "data", "models", "rewards", "rollouts"},
    "assembly": {
        "accounting",
        *("attention", "config", "data", "engines", "kernels", "models", "objectives", "records"),
        *("rollouts", "selection", "stops", "task_reward", "teachers", "update", "validation"),
    },
    "trainer": {
        *("accounting", "assembly", "batching", "card", "checkpoint", "config", "data"),
        *("evaluation", "models", "objectives", "progress", "records", "rollouts", "sharding"),
        *("signals", "trackers", "update"),
    },
    "gradient_quality": {
        *("batching", "data", "diagnostics", "objectives", "rewards", "rollouts", "trainer"),
        "update",
    },
    "sweep": {"config", "evaluation", "gradient_quality", "records", "trainer"},
    "push": set(),
    "demo": {
        *("config", "embedded", "evaluation", "gradient_quality", "records", "report"),
        "trainer",
    },
}
SEES_EVERYTHING = {"cli", "__main__", "__init__"}


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


@pytest.mark.parametrize("name", ["grading", "metrics", "answers", "comparison"])
def test_grading_and_metrics_need_nothing_of_ours(name: str) -> None:
    path = PACKAGE / "evaluation" / f"{name}.py"
    assert imported(path) <= {"evaluation"}
    heavy = {"runner", "benchmarks"}
    assert not any(h in path.read_text() for h in (f"evaluation.{x} " for x in heavy))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("poweropd.rewards", ["transformers", "accelerate", "datasets", "pydantic", "numpy.ma"]),
        ("poweropd.kernels", ["transformers", "accelerate", "datasets", "pydantic"]),
        ("poweropd.evaluation.grading", ["torch", "transformers", "datasets"]),
        ("poweropd.evaluation.metrics", ["torch", "transformers", "datasets"]),
        ("poweropd.evaluation.settings", ["torch", "transformers", "datasets"]),
        ("poweropd.cli", ["torch", "transformers"]),
    ],
)
def test_a_part_loads_nothing_it_does_not_need(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {absent} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
