"""The shipped recipes load, and the README's snippet does what it says."""

import re
from pathlib import Path

import pytest

from poweropd import Config

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    config = Config.load(path)
    assert config.run.dir == f"runs/{path.stem}"
    assert config.reward.create()


def test_the_recipe_in_the_readme_is_the_quickstart(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shown = tmp_path / "quickstart.yaml"
    shown.write_text(text)
    assert Config.load(shown) == Config.load(ROOT / "recipes" / "quickstart.yaml")


def test_the_snippet_in_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["student_log_probs"].grad.abs().sum() > 0
