"""Settings of the documentation site: `make docs` builds these pages with Sphinx into site/.

The tables of index.md are the navigation. A page that they do not link, a broken link and a missing
anchor are warnings, and `make docs` turns warnings into errors.
"""

import re

from sphinx.application import Sphinx

project = "poweropd"
html_title = project
extensions = ["myst_parser"]
root_doc = "index"
myst_heading_anchors = 4
highlight_language = "none"  # of indented code, which is mostly commands
html_theme = "furo"
html_copy_source = False
html_use_index = False
html_show_copyright = False
html_show_sphinx = False


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Adds a hidden table of contents to the home page: its sections with the pages they link."""
    if name != root_doc:
        return
    for section in source[0].split("\n## ")[1:]:
        caption = section.partition("\n")[0]
        links = re.findall(r"^\| \[(.*?)\]\((.*?)\.md\)", section, re.MULTILINE)
        pages = "\n".join(f"{title} <{page}>" for title, page in links)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def setup(app: Sphinx) -> None:
    """Registers what Sphinx calls while it reads the pages."""
    app.connect("source-read", add_navigation)
