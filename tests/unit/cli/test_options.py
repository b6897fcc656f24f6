"""Options of the command line: how they are given, how an error names them, and how the help shows them."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import pytest
from pydantic.dataclasses import dataclass

from siftune.base.errors import RecipeError
from siftune.base.settings import CONFIG, CountOrShare, Positive, Validated
from siftune.cli.commands import COMMANDS
from siftune.cli.main import main
from siftune.cli.options import _GROUPS, Flag, options_page, parse
from siftune.cli.train import Options as Train
from siftune.methods import all_parts
from siftune.methods.options import GASTSettings, ISTSettings


@dataclass(config=CONFIG, kw_only=True)
class Plain(Validated):
    """A command."""

    run: Annotated[str, Flag(positional=True)]
    """Run folder."""
    returned: Annotated[tuple[Path, ...], Flag("return", "-r")]
    """Returns."""
    weights: tuple[Positive, ...] | None = None
    """What each counts."""
    some: CountOrShare = 0.5
    """Some of 100 % of the rows."""
    wide: bool = False
    """Whether to be wide."""


def train(*words):
    return parse(Train, [*map(str, words)], "siftune train")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("rank: 8\nlr: 0.1\ntrain: a.jsonl\n")
    return path


def test_flags_override_recipes_and_recipes_override_defaults(recipe, tmp_path):
    assert train() == Train()
    assert train(recipe) == Train(rank=8, lr=0.1, train="a.jsonl")
    assert train("--rank=4", recipe, "--batch_size", 3) == Train(rank=4, lr=0.1, train="a.jsonl", batch_size=3)
    assert train("--no-completion-only", recipe).completion_only is False
    assert train("--train", "a", "b", "--train", "c").train == ("a", "b", "c")
    assert train("--eval", "None", "--layers", 0, -1) == Train(layers=(0, -1))
    assert train("--gast.select", "0.5", "--ist.score_batch_size=2") == Train(
        gast=GASTSettings(0.5), ist=ISTSettings(score_batch_size=2)
    )
    (tmp_path / "later.yml").write_text("rank: 2\n")
    assert train(recipe, tmp_path / "later.yml").rank == 2


def test_a_target_brings_its_defaults_below_flags(recipe):
    aimed = {**GASTSettings.with_target, "select": 4}
    assert train(recipe, "--target", "few.jsonl", "--gast.select", 4).gast == GASTSettings(**aimed)


def test_resume_stands_alone_or_takes_a_folder(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("rank: 4\nout: elsewhere\n")
    monkeypatch.chdir(tmp_path)
    assert train("--resume") == Train(resume=True)
    assert train("--out", "a", "--resume", "--rank", 4) == Train(resume=True, rank=4, out="a")
    assert train("--resume", "runs/a/checkpoint-3").resume == "runs/a/checkpoint-3"
    assert train("--resume", tmp_path) == train(f"--resume={tmp_path}") == Train(resume=True, rank=4, out=str(tmp_path))


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], True), (["true"], True), (["True"], True), (["false"], False), (["0.25"], 0.25), (["480"], 480),
        (["1"], 1),
    ],
    ids=str,
)  # fmt: skip
def test_sift_stands_alone_or_takes_true_false_or_an_amount(tmp_path, words, value):
    (tmp_path / "r.yaml").write_text(f"sift: {' '.join(words) or 'true'}")
    (tmp_path / "no.yaml").write_text(f"sift: {'true' if value is False else 'false'}")
    for given in ([tmp_path / "r.yaml"], ["--sift", *words], [tmp_path / "no.yaml", "--sift", *words]):
        sift = train(*given).sift
        assert (sift, type(sift)) == (value, type(value))


@pytest.mark.parametrize("word", ["yes", "1.5", "0"])
def test_another_word_for_sift_is_refused(word):
    with pytest.raises(RecipeError, match=f"--sift is {word}, but must be"):
        train("--sift", word)


def test_a_recipe_overrides_that_of_the_run_to_resume(tmp_path):
    (tmp_path / "recipe.yaml").write_text("rank: 4\nseed: 5\n")
    (tmp_path / "more.yaml").write_text("rank: 8\n")
    wanted = Train(resume=True, rank=8, seed=5, out=str(tmp_path))
    assert train("--resume", tmp_path, tmp_path / "more.yaml") == wanted


def test_positional_values_lists_and_short_forms():
    given = parse(Plain, ["-r", "a", "--wide", "RUN", "--weights", "1,2", "--return", "b"], "siftune x")
    assert given == Plain(run="RUN", returned=(Path("a"), Path("b")), weights=(1.0, 2.0), wide=True)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--methd", "ist"], ["--methd", "--method"]),
        (["--learning-rate=1"], ["--learning-rate", "--lr"]),
        (["--metho", "ist"], ["--metho", "--method"]),
        (["--zzzz"], ["--zzzz", "--help"]),
        (["--active", "1"], ["--rst.active", "--ist.active"]),
        (["--gast.selct", "1"], ["--gast.selct", "--gast.select"]),
        (["--adapter", "vera"], ["--adapter is vera", "rslora"]),
        (["--rank", "eight"], ["--rank is eight", "integer"]),
        (["--rank", "0"], ["--rank is 0", "at least 1"]),
        (["--rank"], ["--rank", "integer"]),
        (["--rank", "--lr", "1"], ["--rank", "integer"]),
        (["--steps", "4", "--steps", "ten"], ["--steps is ten"]),
        (["--lr", "nan"], ["--lr is nan"]),
        (["--ist.active", "fast"], ["--ist.active is fast"]),
        (["--method", "lora"], ["--method is lora", "ist+gast"]),
        (["--dry-run=x"], ["--dry-run"]),
        (["rows.jsonl"], ["--train rows.jsonl"]),
        (["rows"], ["rows", "--help"]),
        (["none.yaml"], ["none.yaml", str(Path.cwd())]),
    ],
)
def test_an_error_names_the_option_and_what_to_do(words, parts):
    with pytest.raises(RecipeError) as caught:
        train(*words)
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["RUN and --return", "siftune x --help"]),
        (["RUN", "--returned", "a"], ["--returned", "--return"]),
        (["RUN", "-r", "a", "--weights", "a"], ["--weights", "a", "numbers"]),
        (["RUN", "r.yaml", "-r", "a"], ["r.yaml"]),
    ],
)
def test_an_error_names_values_without_a_flag(words, parts):
    with pytest.raises(RecipeError) as caught:
        parse(Plain, words, "siftune x")
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


def test_a_run_without_a_flag_is_a_run_to_resume(tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: dense\n")
    with pytest.raises(RecipeError, match=f"--resume {tmp_path}"):
        train(tmp_path)


def shown(kind, capsys, word="--help-all"):
    with pytest.raises(SystemExit) as stop:
        parse(kind, [word], "siftune x")
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_types_ranges_defaults_and_methods(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(Train, capsys)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for part in (
        "--rank INT Rank of the adapter matrices",
        "--batch-size INT Rows per forward pass. [at least 1; default: 16]",
        "--quantize {4bit,8bit} ",
        "--layers INT [INT ...] ",
        "--completion-only, --no-completion-only ",
        "with --method gast or ist+gast: --gast.select INT|FLOAT ",
        "--json prints",
    ):
        assert part in words
    assert "100 %" in shown(Plain, capsys)


def test_help_has_the_usual_options_and_help_all_the_others(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    few, every = (shown(Train, capsys, word) for word in ("--help", "--help-all"))
    assert len(few.splitlines()) < 140
    for flag in ("--train TEXT", "--steps INT", "--sift ", "--dry-run"):
        assert flag in few
    for flag in ("--dp-epsilon FLOAT", "--gast.select INT|FLOAT", "with --method gast"):
        assert flag in every
        assert flag not in few
    assert "`siftune x --help-all`" in few
    assert every.count("--help-all") == 1
    assert shown(Plain, capsys, "--help") == shown(Plain, capsys)


def test_help_of_train_has_groups_and_examples(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    few, every = (shown(Train, capsys, word) for word in ("--help", "--help-all"))
    titles = ["options", "data", "which rows", "model", "training", "run"]
    assert re.findall(r"^([a-z ]+):$", few, re.MULTILINE) == ["methods", *titles]
    assert len(re.findall(r"^    siftune train ", few, re.MULTILINE)) == 3
    for flag in ("--keep", "--drop-rows", "--eval-share", "--resume", "--limit", "--report-to"):
        assert re.search(rf"^  {flag} ", few, re.MULTILINE), flag
    for flag in ("--alpha", "--optim"):
        assert f"  {flag} " not in few
        assert f"  {flag} " in every
    rows = few.partition("which rows:")[2].partition("model:")[0]
    assert re.findall(r"^  (--[\w-]+)", rows, re.MULTILINE)[:3] == ["--target", "--sift", "--avoid"]


def test_every_option_of_train_is_in_one_group():
    grouped = " ".join(f"{usual} {rare}" for usual, rare in _GROUPS.values()).split()
    assert len(grouped) == len({*grouped})
    assert {*grouped} == {field.name for field in fields(Train)} - {part.settings.group for part in all_parts()}


def test_train_has_few_options(capsys):
    lines = [line.split()[0] for line in shown(Train, capsys).splitlines() if line.startswith("  -")]
    assert len([line for line in lines if line not in ("-h,", "--help-all")]) <= 75


_HELP = (
    "import sys; from siftune.cli.commands import COMMANDS; from siftune.cli.main import main\n"
    "codes = [main([*words, '--help']) for words in ([], *([name] for name in COMMANDS))]\n"
    "sys.exit(any(codes) or any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
)


def test_help_of_every_command_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: siftune") == done.stdout.count("[--json]") == len(COMMANDS) + 1


@pytest.mark.parametrize(("command", "name"), [("rows", "RUN"), ("export", "RUN"), ("verify", "FOLDER")])
def test_a_missing_positional_value_is_named(capsys, command, name):
    assert main([command]) == 2
    assert f"{name} must be given" in capsys.readouterr().err


def test_a_page_lists_every_option_of_every_command():
    page = options_page()
    for word in COMMANDS:
        assert f"## siftune {word}\n" in page
    for flag in ("--optim", "--gast.select", "--return", "--lambda-mlp"):
        assert f"`{flag} " in page


@pytest.mark.parametrize(
    ("command", "word", "advice"),
    [
        ("train", "--share", "`--sift 0.5` trains on half of the pool"),
        ("train", "--rows", "did you mean --limit?"),
        ("eval", "--rows", "did you mean --limit?"),
        ("train", "--pool", "did you mean --train?"),
        ("sift", "--pool", "did you mean --train?"),
        ("sift", "--threshold", "did you mean --max-score?"),
        ("train", "--threshold", "`siftune sift` has --max-score"),
        ("train", "--processes", "`torchrun --nproc_per_node 2 -m siftune"),
        ("sift", "--processes=2", "`torchrun --nproc_per_node 2 -m siftune"),
        ("export", "--share", "see `siftune export --help`"),
    ],
)
def test_a_name_of_something_else_leads_to_the_right_option(capsys, command, word, advice):
    assert main([command, word, "2"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"siftune: error: unknown option {word.partition('=')[0]} of `siftune {command}`; ")
    assert advice in message
