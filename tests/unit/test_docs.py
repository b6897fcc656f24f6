"""What the documentation names exists: links, headings, files, functions, tests, commands and flags."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from siftune.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = ("src", "tests", "benchmarks", "examples")

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


def anchors(page):
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def files_named(words):
    """The files that end in a path, such as methods/gast/maths.py."""
    return [path for whole, path in python_files().items() if whole.endswith(f"/{words}")]


def commands(text):
    """Command lines of a page, from shell blocks and inline code, as (program or script, words after it)."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shell = "\n".join(block for language, block in blocks if language in ("", "sh")).replace("\\\n", " ")
    lines = [part for line in shell.splitlines() for part in line.split("&&")]
    run = ""
    for line in [*lines, *re.findall(r"`(siftune [^`]+)`", text)]:
        shorthand = re.match(r'run="(.*)"', line)
        run = shorthand.group(1) if shorthand else run
        words = re.search(r"(?:^|  |\w=\S+ )(siftune|python) (\S+)([^(]*)", line.strip().replace("$run", run))
        if words and (words.group(1) == "python" or re.fullmatch(r"[a-z]+", words.group(2))):
            yield words.group(2), shlex.split(words.group(3), comments=True)


@cache
def script_text(script):
    return (ROOT / script).read_text(encoding="utf-8")


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
def test_files_that_are_named_exist(page):
    for words in set(re.findall(r"[\w/.-]*\w\.py\b", page.read_text(encoding="utf-8"))):
        name = words.removeprefix("../").removeprefix("./")
        assert files_named(name), f"{page.name} names {words}"


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
def test_commands_and_flags_exist(page, capsys):
    for program, words in commands(page.read_text(encoding="utf-8")):
        if program.endswith(".py"):
            known = script_text(program)
        else:
            assert program in COMMANDS, f"{page.name} runs siftune {program}"
            known = help_of(program, capsys)
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"{re.escape(flag)}(?![\w.-])", known), f"{page.name}: {program} has no {flag}"


def help_of(command, capsys):
    """The help of a command."""
    if command not in _HELP:
        capsys.readouterr()
        assert main([command, "--help"]) == 0
        _HELP[command] = capsys.readouterr().out
    return _HELP[command]


_HELP: dict[str, str] = {}
