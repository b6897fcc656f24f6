"""Tables by which commands find what is not of the main job, and that the main job does without it."""

import inspect
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest

from siftune.base.errors import KitError
from siftune.cli.commands import COMMANDS, module_of
from siftune.cli.sources import KINDS, Kind, is_ordinary, kind_of, source_of
from siftune.train.source import ModelSource


def test_every_kind_has_the_functions_of_a_kind():
    for module in map(import_module, KINDS.values()):
        for name, function in inspect.getmembers(Kind, inspect.isfunction):
            if not name.startswith("_"):
                _, *wanted = inspect.signature(function).parameters
                assert [*inspect.signature(getattr(module, name)).parameters] == wanted, f"{module.__name__}.{name}"


@pytest.mark.parametrize("content", [None, "{}", '{"short_name": "a progressive web app"}'])
def test_a_folder_is_an_ordinary_model_unless_its_manifest_says_something_else(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert is_ordinary(tmp_path) == (content is None)
    assert (kind_of(tmp_path) is None) == (content is None)
    assert source_of(str(tmp_path)) == ModelSource(str(tmp_path))
    with pytest.raises(KitError, match="is no kit, and --public-key"):
        source_of(str(tmp_path), tmp_path / "key.pem")


def test_a_name_that_is_no_folder_is_an_ordinary_model():
    assert source_of("smollm2") == ModelSource("smollm2")


@pytest.mark.parametrize("command", COMMANDS)
def test_own_paths_of_a_command_are_options_of_it(command):
    module = module_of(command)
    own = [name for names in getattr(module, "PATHS", {}).values() for name in names]
    assert {*own} <= {field.name for field in fields(module.Options)}


_MAIN_JOB = """
import sys
from siftune.cli.main import main
base, rows, few = sys.argv[1:]
usual = ["--train", rows, "--model", base, "--template", "none", "--steps", "1", "--batch-size", "2", "--rank", "2"]
codes = [
    main(words)
    for words in (
        ["--help"],
        ["train", *usual, "--target", few, "--out", "run"],
        ["eval", "run", "--data", few, "--metrics", "perplexity"],
        ["ask", "run", "1 and 1?", "--max-new-tokens", "2"],
        ["export", "run"],
        ["report", "run", "-o", "page.html"],
    )
]
print([name for name in sys.modules if name.startswith("siftune.offsite")])
sys.exit(any(codes))
"""


def test_the_main_job_imports_nothing_of_offsite_tuning(base, tmp_path):
    lines = [f'{{"prompt": "{i} and {i}?", "completion": "{i + i}"}}\n' for i in range(8)]
    for name, own in (("rows", lines[:4]), ("few", lines[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(own))
    done = subprocess.run(
        [sys.executable, "-c", _MAIN_JOB, base, "rows.jsonl", "few.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "page.html").exists()
