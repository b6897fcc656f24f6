"""The documentation as a site: `pip install -e ".[docs]" && sphinx-build -W docs site`.

The same pages are readable in a repository browser. They link to each other and to files of the repository by relative
paths. On the site, links to files outside of `docs/` become their paths.
"""

import re
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

from siftune.cli.options import options_page

HERE = Path(__file__).parent

project, author, copyright = "siftune", "the siftune developers", "the siftune developers"
version = release = version_of("siftune")

extensions = [
    "myst_nb",  # Markdown, and the notebook with its recorded output
    "sphinx.ext.autodoc",  # the reference, from docstrings
    "sphinx.ext.napoleon",  # Google style
    "sphinx.ext.viewcode",
]
exclude_patterns = ["site"]
suppress_warnings = ["myst.header"]  # some pages begin with a lower heading

nb_execution_mode = "off"  # tests run it
nb_output_stderr = "remove"  # progress bars
myst_heading_anchors = 4  # links to headings, as on GitHub
myst_links_external_new_tab = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"siftune {version}"
html_static_path: list[str] = []

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]*)\)")


def _inside(match: re.Match[str]) -> str:
    """Replace a link that leaves `docs/`: the README becomes the index, other targets become the path of a file."""
    text, target = match.groups()
    path = target.partition("#")[0].removeprefix("../")
    return f"[{text}](index.md)" if path == "README.md" else text if text == path else f"{text} (`{path}`)"


def _add_options(app: Sphinx, name: str, source: list[str]) -> None:
    """Fill the page of options from the dataclasses of the commands."""
    if name == "commands":
        source[0] = source[0].partition("\n")[0] + "\n\n" + options_page()


def _keep_inside(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = _LINK.sub(_inside, source[0])


def setup(app: Sphinx) -> None:
    """Rewrite links as pages are read."""
    app.connect("source-read", _add_options)
    app.connect("source-read", _keep_inside)
