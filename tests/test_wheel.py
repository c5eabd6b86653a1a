"""The built wheel in an environment of its own, outside any checkout (`make wheel`, in CI).

The environment has the wheel alone; its dependencies are those of the environment of the tests,
which is appended to its path. Whether the wheel names all of them is tested by what it imports.
"""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest

from poweropd import __version__

ROOT = Path(__file__).parent.parent
#: Packages that pydantic, jinja2 and math-verify bring along, and trackers that a user installs.
BROUGHT = {"pydantic_core", "markupsafe", "sympy", "latex2sympy2_extended", "mlflow"}
#: The trainers that integrations/ adapts, and what they bring along; only there are they imported.
TRAINERS = {"nemo_rl", "prime_rl", "skyrl", "slime", "swift", "trl", "verl"}
TRAINERS |= {"datasets", "ray", "tensordict"}

wheel = pytest.mark.wheel
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def built() -> Path:
    (path,) = (ROOT / "dist").glob("poweropd-*.whl")
    return path


@pytest.fixture(scope="module")
def run(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the wheel's command line in an empty folder."""
    home, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    places = {"base": str(home), "platbase": str(home)}
    own = Path(sysconfig.get_path("purelib", "venv", vars=places))
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(built)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def poweropd(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [home / "bin" / "poweropd", *arguments],
            cwd=folder,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    where = subprocess.run(
        [python, "-c", "import poweropd; print(poweropd.__file__)"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(home)
    return poweropd


@wheel
def test_the_wheel_holds_what_is_not_code(built: Path) -> None:
    names = set(ZipFile(built).namelist())
    package = ROOT / "src" / "poweropd"
    others = [p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    expected = {f"poweropd/{path.relative_to(package)}" for path in others}
    recipes = (ROOT / "recipes").rglob("*.yaml")
    expected |= {f"poweropd/{path.relative_to(ROOT)}" for path in recipes}
    assert {"poweropd/py.typed", "poweropd/embedded/student/model.safetensors"} <= expected
    assert expected <= names
    assert not [name for name in names if name.startswith(("tests", "tools"))]


@wheel
def test_the_demo_of_the_wheel_runs(run: Run) -> None:
    assert run("--version").stdout == f"poweropd {__version__}\n"
    done = run("demo", "--steps", "2", "--problems", "16")
    assert done.returncode == 0, done.stderr
    assert "after power" in done.stdout


@wheel
def test_a_recipe_of_the_wheel_trains_without_a_checkout(run: Run) -> None:
    small = ["train.steps=1", "train.prompts_per_step=2", "rollout.max_new_tokens=8"]
    done = run("train", "recipes/embedded.yaml", *small)
    assert done.returncode == 0, done.stderr
    assert "runs/embedded/final" in done.stdout + done.stderr


def test_everything_that_is_imported_is_a_dependency() -> None:
    """Else the wheel would work here, where the developers' tools are, and nowhere else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *(one for name in extras for one in extras[name])]
    declared = {re.split(r"[\s>=<\[;]", text)[0].lower().replace("_", "-") for text in named}
    known = packages_distributions()
    missing = {}
    for path in (ROOT / "src").rglob("*.py"):
        brought = BROUGHT | (TRAINERS if path.parent.name == "integrations" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules.append(node.module)
            for module in {name.partition(".")[0] for name in modules}:
                ours = module in sys.stdlib_module_names or module == "poweropd"
                found = {name.lower().replace("_", "-") for name in known.get(module, [module])}
                if not ours and module not in brought and not found & declared:
                    missing[str(path.relative_to(ROOT))] = module
    assert missing == {}
