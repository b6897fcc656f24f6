"""The command `siftune`: picks the command's module, and turns every way to fail into words and an exit code.

Exit codes: 0 done, 2 the user's input, 1 a bug of ours, 130 interrupted, 141 the reader of our output is gone.
"""

import contextlib
import errno
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from siftune.base.environment import ABOUT, launch_rank, launch_size, quiet, ran_out, settle_threads
from siftune.base.errors import InputError, SiftuneError
from siftune.base.settings import nearest
from siftune.base.text import jsonable, one_line, visible
from siftune.cli.commands import COMMANDS, GROUPS, module_of

# faults of the machine that the user can mend -> what to do
_MACHINE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EFBIG: "raise the limit on a file's size (`ulimit -f`), or choose another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder or file that you may use",
    errno.EPERM: "choose a folder or file that you may use",
    errno.ENAMETOOLONG: "give a shorter name",
}
# names of files that Python refuses
_NAMES = {
    "Could not determine home directory": "a path begins with ~ and a name that is no user's here: give another path",
    "embedded null byte": "the name of a file or folder holds a null character: give another name",
    "surrogates not allowed": "the name of a file or folder is not UTF-8: give another name",
}
_FIRST_SPEAKS = 2.0  # seconds; what all ranks find, rank 0 says, and the launcher ends the others meanwhile
# what gloo says where another process is gone
_ALONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
# safetensors and torch.save say in their own words that a write failed; the latter does not say why
_CODE = re.compile(r"\(os error (\d+)\)")
_WRITE_FAILED = "inline_container.cc"
_NOT_DETERMINISTIC = " does not have a deterministic implementation"  # torch, after the name of an operation
# advice of bitsandbytes on faster kernels, told wherever PEFT is imported, and on its own rounding, for every module
_ADVICE = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by the arguments after the program's name, and return the exit code."""
    settle_threads()
    _write_what_the_console_can()
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    arguments = [word for word in arguments if word != "--json"]
    try:
        with _terminated(), _logs(), stdout_to_stderr() if as_json else contextlib.nullcontext():
            code, result = _guarded(arguments)
        if as_json and result is not None and not launch_rank():
            plain = not (sys.stdout.encoding or "").lower().startswith("utf")
            sys.stdout.write(json.dumps(jsonable(result), allow_nan=False, ensure_ascii=plain) + "\n")
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # nobody reads on; a null device keeps the interpreter's last flush from failing as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to standard error whatever is written to standard output, by child processes and C code too."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Have SIGTERM end a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_what_the_console_can() -> None:
    """Have characters replaced that the console's encoding lacks, such as λ in help on Windows: no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _guarded(arguments: Sequence[str]) -> tuple[int, dict[str, Any] | None]:
    """Run the command; return the exit code and the object for `--json`."""
    try:
        return 0, _dispatch(arguments)
    except SystemExit as stop:
        return int(stop.code or 0), None
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as stop:
        if launch_rank():  # a signal reaches all ranks, and rank 0 says where the results are
            return 130, None
        return 130, _say("; ".join(["interrupted", *getattr(stop, "__notes__", [])]), "siftune: ")
    except Exception as error:
        sentence = _explain(error)
        if sentence is None or os.environ.get("SIFTUNE_DEBUG"):
            traceback.print_exc()
        if sentence is not None:
            return getattr(error, "exit_code", 2), _say(sentence)
        return 1, _say(f"{type(error).__name__}: {error} (this is a bug in siftune; please report it)")


def _dispatch(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Run the command that the first argument names, and return its result."""
    word, *rest = arguments or ["--help"]
    if word in ("-h", "--help"):
        _print_help(sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else 2)
    if word == "--version":
        from siftune import __version__

        sys.stdout.write(f"siftune {__version__}\n")
        return {"version": __version__}
    if word not in COMMANDS:
        close = nearest(word, COMMANDS)
        guess = f"did you mean `siftune {close}`?" if close else "`siftune --help` lists the commands"
        raise InputError(f"unknown {'option' if word.startswith('-') else 'command'} {word}; {guess}")
    from siftune.cli.options import parse

    command = module_of(word)
    options = parse(command.Options, rest, f"siftune {word}")
    from siftune.cli.paths import check_paths

    check_paths(options, getattr(command, "PATHS", {}))
    result: dict[str, Any] = command.run(options)
    return result


def _explain(error: Exception) -> str | None:
    """Return the sentence for an error that the user can mend, or None for a bug."""
    if isinstance(error, SiftuneError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return _explain_missing(error.name or "")
    if launch_size() > 1 and any(words in str(error) for words in _ALONE):
        return "another process of the run ended, and this one cannot continue without it"
    if ran_out(error):
        reason = " ".join(str(error).split())[:150] or "MemoryError"
        return f"memory ran out ({reason}): give a smaller --batch-size, a shorter --max-length, or a smaller model"
    operation, separator, _ = str(error).partition(_NOT_DETERMINISTIC)
    if separator:
        return f"{operation} has no deterministic implementation on this device: train without --deterministic"
    if sentence := next((_NAMES[words] for words in _NAMES if words in str(error)), None):
        return sentence
    where = f"{one_line(str(file))}: " if (file := getattr(error, "filename", None)) else ""
    if _WRITE_FAILED in str(error):
        return f"{where}the file could not be written, probably because the disk is full; {_MACHINE[errno.ENOSPC]}"
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return f"{where}{error.strerror}; {_MACHINE[error.errno]}"
    if (match := _CODE.search(str(error))) and (code := int(match[1])) in _MACHINE:
        return f"{where}{os.strerror(code)}; {_MACHINE[code]}"
    return None


def _explain_missing(module: str) -> str | None:
    """Return the sentence for a module that cannot be imported, or None where it ought to be there."""
    package = module.partition(".")[0]
    if package in ("", "siftune"):
        return None
    return f"the package {package} is needed for this and not installed: run `pip install {package}`"


def _say(sentence: str, prefix: str = "siftune: error: ") -> dict[str, Any]:
    """Write a failure to standard error, and return it for `--json`."""
    if launch_rank():
        time.sleep(_FIRST_SPEAKS)
    sys.stderr.write(f"{prefix}{visible(sentence)}\n")  # it may quote an untrusted file
    return {"error": sentence}


def _print_help(file: TextIO) -> None:
    """List the commands, by group."""
    wide = max(40, shutil.get_terminal_size().columns - 2)
    lines = ["usage: siftune COMMAND [OPTIONS] [--json]", "", *textwrap.wrap(ABOUT, wide)]
    width = max(map(len, COMMANDS))
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {word:<{width}}  {line}" for word, (_, line) in commands.items())]
    lines += ["", "`siftune COMMAND --help` lists the options; `siftune --version` prints the version."]
    file.write("\n".join(lines) + "\n")


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is at that moment: progress displays put themselves in its place.

    Control characters are written out, since messages may quote untrusted files.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The message."""
        return visible(super().format(record))

    @property
    def stream(self) -> TextIO:
        """The standard error of the moment."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Keep nothing."""


@contextlib.contextmanager
def _logs() -> Iterator[None]:
    """Show siftune's log on standard error while a command runs, and no advice of others that users cannot take."""
    logger = logging.getLogger("siftune")
    handler, level = _StderrHandler(), logger.level
    handler.setFormatter(logging.Formatter("siftune: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with quiet(*_ADVICE):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
