"""The README and the pages of docs/: short enough to read, and true about files and modules."""

import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
GENERATED = {DOCS / "configuration.md"}  # its text is that of the fields in config/sections.py
HEADINGS = [
    *("Quickstart", "Train your own", "Evaluate", "Compare", "Only the reward"),
    *("In other trainers", "Map of the code", "Limits", "Licence"),
]
# Files that CONTRIBUTING.md names although they are still to come.
COMING: set[str] = set()

every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
written_page = pytest.mark.parametrize(
    "path", [path for path in PAGES if path not in GENERATED], ids=lambda path: path.name
)


def without_code(text: str) -> str:
    """Returns a page without its code blocks, fenced or indented by four spaces."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def words(text: str) -> int:
    """Returns the number of words: parts between spaces and bars that have a letter or digit."""
    return sum(any(map(str.isalnum, word)) for word in text.replace("|", " ").split())


def paragraphs(text: str) -> Iterator[str]:
    """Yields paragraphs and list items; code, tables, headings and pictures are left out."""
    for block in without_code(text).split("\n\n"):
        for part in re.split(r"\n(?=(?:-|\d+\.) )", block.strip("\n")):
            if part and not part.startswith(("|", "#", "![")):
                yield part


def test_the_readme_is_short_and_has_its_headings() -> None:
    text = (ROOT / "README.md").read_text()
    assert words(without_code(text)) <= 1000  # the words of tables count
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS


def test_every_page_is_in_the_index() -> None:
    text = (DOCS / "index.md").read_text()
    linked = re.findall(r"^\| \[.+?\]\((.+?\.md)\) \| .+ \|$", text, re.MULTILINE)
    assert sorted([*linked, "index.md"]) == [path.name for path in sorted(DOCS.glob("*.md"))]


@written_page
def test_prose_has_short_lines_and_short_paragraphs(path: Path) -> None:
    for paragraph in paragraphs(path.read_text()):
        assert words(paragraph) <= 120, paragraph
        for line in paragraph.splitlines():
            assert len(line) <= 100 or " " not in line.strip(), line  # a link may stand alone


@every_page
def test_links_between_files_resolve(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)(.+?)\)", without_code(path.read_text())):
        assert (path.parent / target.partition("#")[0]).exists(), target  # `make docs`: anchors


def is_in_an_adapter(name: str) -> bool:
    """Returns whether a name is an adapter's or in one, which may need a trainer to be imported."""
    if not name.startswith("poweropd.integrations."):
        return False
    module, _, attribute = name.rpartition(".")
    files = [ROOT / "src" / f"{n.replace('.', '/')}.py" for n in (name, module)]
    return (
        files[0].exists()
        or re.search(rf"^(def|class) {attribute}\b", files[1].read_text(), re.M) is not None
    )


@every_page
def test_named_files_and_modules_exist(path: Path) -> None:
    text = path.read_text()
    for name in set(re.findall(r"\b(?:src|docs|tests|benchmarks|tools)/[\w./-]*\w", text)) - COMING:
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"\bpoweropd(?:\.[A-Za-z]\w*)+", text)):
        if not is_in_an_adapter(name):
            pkgutil.resolve_name(name)


def test_the_snippets_of_the_python_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec("\n".join(snippets), names)
    assert "2 runs/from-python/final" in capsys.readouterr().out
    assert (tmp_path / "runs/eval/runs--from-python--final/embedded.jsonl").exists()
