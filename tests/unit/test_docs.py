"""The documentation: what it names exists (links, files, functions, commands, flags), plain wording, whole tables."""

import ast
import re
import shlex
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import siftune
from lab import recorded, tables
from siftune.base.environment import ABOUT
from siftune.bench.cost import parse_methods
from siftune.cli.commands import COMMANDS
from siftune.cli.main import main
from siftune.cli.options import parse
from siftune.recipe.checks import check

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "lab/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "lab" / "results").glob("*.md")),
]
FOLDERS = ("src", "tests", "lab", "examples")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@cache
def python_files():
    """Every Python file by its path in the repository, with a slash in front."""
    return {f"/{path.relative_to(ROOT).as_posix()}": path for name in FOLDERS for path in (ROOT / name).rglob("*.py")}


@cache
def defined_names(path):
    """Functions and classes of a file, and Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


@cache
def source_modules():
    """Every module of siftune by its dotted path, with the functions and classes that it defines."""
    paths = {path.removeprefix("/src/").removesuffix(".py"): file for path, file in python_files().items()}
    return {
        path.replace("/", ".").removesuffix(".__init__"): defined_names(file)
        for path, file in paths.items()
        if path.startswith("siftune/")
    }


def exists(dotted):
    """Whether a name such as `gast.maths.draw` is a module's, or the end of a module's path."""
    parts = dotted.split(".")
    cuts = [(".".join(parts[:cut]), ".".join(parts[cut:])) for cut in range(1, len(parts) + 1)]
    return any(
        f".{module}".endswith(f".{path}") and (not name or name in names or hasattr(import_module(module), name))
        for module, names in source_modules().items()
        for path, name in cuts
    )


def anchors(page):
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def files_named(words):
    """The files that end in a path, such as methods/gast/maths.py."""
    return [path for whole, path in python_files().items() if whole.endswith(f"/{words}")]


def shell_lines(text):
    """Command lines in a page's shell blocks, with `$run` spelled out."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shell = "\n".join(block for language, block in blocks if language in ("", "sh")).replace("\\\n", " ")
    run = ""
    for line in (part.strip() for whole in shell.splitlines() for part in whole.split("&&")):
        shorthand = re.match(r'run="(.*)"', line)
        run = shorthand.group(1) if shorthand else run
        yield line.replace("$run", run)


def calls(lines, program):
    """Arguments of a program: (command or script, further arguments)."""
    for line in lines:
        words = re.search(
            rf"(?:^|  |▶ |\w=\S+ ){program} ([a-z][\w/.-]*)(?: ([^(]*))?$", line.partition("(")[0].strip()
        )
        if words:
            yield words.group(1), shlex.split(words.group(2) or "", comments=True)


@every_page
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}: no such heading"


@every_page
def test_a_blank_line_is_between_tables(page):
    """Without one, a second table is rows of the first."""
    lines = page.read_text(encoding="utf-8").splitlines()
    heads = [place for place, line in enumerate(lines) if line.startswith("|--")]
    assert [lines[place - 2] for place in heads if lines[place - 2].startswith("|")] == []


@every_page
def test_no_line_begins_with_a_per_cent_sign(page):
    """The site takes such a line as a comment."""
    assert re.findall(r"^\s*%.*", page.read_text(encoding="utf-8"), re.MULTILINE) == []


@every_page
def test_files_that_are_named_exist(page):
    for words in set(re.findall(r"[\w/.-]*\w\.py\b", page.read_text(encoding="utf-8"))):
        name = words.removeprefix("../").removeprefix("./")
        assert files_named(name), f"{page.name} names {words}"


OBJECTS = ("last", "settings", "gast", "transformers")  # attributes of objects and names of options, not of our modules


def test_modules_that_docstrings_name_exist():
    functions = set().union(*source_modules().values())
    folders = {part for module in source_modules() for part in module.split(".")}
    dead = []
    for path, file in python_files().items():
        if not path.startswith("/src/"):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
        text = "\n".join(ast.get_docstring(node) or "" for node in nodes)
        for name in re.findall(r"[\w/.-]*\w\.py\b", text):
            if not (file.parent / name).exists() and not ("/" in name and files_named(name)):
                dead.append(f"{path}: {name}")
        for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", text):
            first, last = name.split(".")[0], name.split(".")[-1]
            is_file = last in ("json", "jsonl", "csv", "parquet", "yaml", "py", "max")
            if (first in folders or last in functions) and first not in OBJECTS and not is_file and not exists(name):
                dead.append(f"{path}: {name}")
    assert not dead, "\n".join(dead)


def test_every_function_and_test_in_the_paper_index_exists():
    text = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    entries = re.findall(r"`([\w/]+\.py)::([\w.]+)`", text)
    assert len(entries) > 50
    assert text.count("::") == len(entries), "an entry is not of the form `path::name`"
    for path, name in entries:
        files = files_named(path)
        assert len(files) == 1, f"{path} is {files}: give more of its path"
        assert name in defined_names(files[0]), f"{path} has no {name}"


@every_page
def test_command_lines_are_understood(page):
    for command, words in calls(shell_lines(page.read_text(encoding="utf-8")), "siftune"):
        assert command in COMMANDS, f"{page.name} runs siftune {command}"
        options = parse(import_module(COMMANDS[command][0]).Options, words, f"siftune {command}")
        if command == "train":
            check(options)
        if command == "bench":
            parse_methods(options.methods)


@every_page
def test_commands_in_the_text_exist(page, capsys):
    lines = re.findall(r"`(siftune [^`]+)`", page.read_text(encoding="utf-8"))
    for command, words in calls(lines, "siftune"):
        assert command in COMMANDS, f"{page.name} names siftune {command}"
        assert main([command, "--help-all"]) == 0
        flags_are_in(capsys.readouterr().out, words)


def test_options_in_the_text_exist(capsys):
    """Options in inline code; docs/tools.md also names those of other tools, and the changelog removed ones."""
    for command in COMMANDS:
        assert main([command, "--help-all"]) == 0
    text = " ".join([capsys.readouterr().out, *map(options_of, (ROOT / "lab").rglob("*.py")), "--flag"])
    for page in PAGES:
        if page.name not in ("tools.md", "CHANGELOG.md"):
            prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
            words = re.findall(r"--[a-z][\w.-]*\w", " ".join(re.findall(r"`([^`]+)`", prose)))
            flags_are_in(text, [re.sub("^--no-", "--", word) for word in words])


@every_page
def test_flags_of_the_laboratory_exist(page):
    for module, words in calls(shell_lines(page.read_text(encoding="utf-8")), "python -m"):
        if module.startswith("lab."):
            flags_are_in(options_of((ROOT / module.replace(".", "/")).with_suffix(".py")), words)


def options_of(path):
    """A script's text, with the fields of its dataclasses as options."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^    (\w+):", lambda field: f"--{field.group(1).replace('_', '-')} ", text, flags=re.MULTILINE)


def flags_are_in(text, words):
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{re.escape(flag)}(?![\w.-])", text), f"no {flag}"


def test_wording():
    """The expression of the pre-commit hook `wording` matches no line of a Python or Markdown file."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    hook = next(hook for hook in hooks if hook["id"] == "wording")
    forbidden, exempt = re.compile(hook["entry"], re.IGNORECASE), re.compile(hook["exclude"])
    assert forbidden.search(" ".join(("the run", "goes", "on")))
    names = [*python_files(), *(f"/{page.relative_to(ROOT).as_posix()}" for page in PAGES)]
    hits = [
        f"{name}:{number}: {hit.group()}"
        for name in (name.removeprefix("/") for name in names)
        if not exempt.search(name)
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if (hit := forbidden.search(line))
    ]
    assert not hits, "\n".join(hits)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 95
    assert [line for line in lines if len(line) > 140] == []


def test_one_sentence_describes_the_project_everywhere(capsys):
    assert siftune.__doc__ == ABOUT
    for page in ("README.md", "docs/index.md"):
        assert ABOUT in (ROOT / page).read_text(encoding="utf-8").splitlines()[1:3], page
    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["description"] == ABOUT
    assert main(["--help"]) == 0
    assert ABOUT in " ".join(capsys.readouterr().out.split())


def words_of(page):
    return len(page.read_text(encoding="utf-8").split())


def test_documentation_is_short():
    """Measurements have a page per question, with an answer, a table and its results with their commands."""
    assert sum(map(words_of, (ROOT / "docs").glob("*.md"))) <= 19_000
    pages = sorted((ROOT / "docs").glob("measured_*.md"))
    assert len(pages) == 7
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert words_of(page) <= 300, page.name
        assert len(re.findall(r"^\|--", text, re.MULTILINE)) == 1, page.name
        assert "../lab/results/" in text, page.name
        assert "```" not in text, page.name


@pytest.mark.parametrize("name", ["sifting", "avoid", "rows", "forgetting", "gast", "ist", "offsite"])
def test_pages_of_methods_have_the_same_sections(name):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    wanted = ["Use", "Mechanism", "Log entries and files", "Results", "API", "Papers"]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == wanted


def test_the_index_has_a_link_to_each_page_once():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((\w+)\.(?:md|ipynb)\)", text)
    pages = {page.stem for page in (ROOT / "docs").glob("*.md") if not page.stem.startswith("measured_")}
    assert sorted(linked) == sorted(pages - {"index"} | {"notebook"})


def test_recorded_results_have_their_commands():
    assert {*recorded.COMMANDS} <= {*tables.TABLES}
    assert {*recorded.NOTES} <= {*tables.TABLES}
