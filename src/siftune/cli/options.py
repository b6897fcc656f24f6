"""Command-line options from the fields of a dataclass: argparse splits the arguments, pydantic checks the values."""

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin

from siftune.base.errors import RecipeError
from siftune.base.files import refuse_links
from siftune.base.settings import bounds_of, described, help_of, leaves, made, nearest, types_of
from siftune.cli.commands import COMMANDS, module_of
from siftune.methods import METHODS
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe

T = TypeVar("T")

_DATA = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")
_ALL = "--help-all"
# a name that is no option of a command -> an option that the command has, or None for any; and what to do instead
_INSTEAD: dict[str, tuple[str | None, str]] = {
    "share": ("sift", "`--sift 0.5` trains on half of the pool"),
    "threshold": ("sift", "`siftune sift` has --max-score, and --drop-rows takes its file of dropped rows"),
    "processes": (None, "start several processes with `torchrun --nproc_per_node 2 -m siftune …`"),
}
# group of a recipe's settings in the help -> those that --help shows, and those that only --help-all shows
_GROUPS = {
    "data": ("train limit eval eval_share columns template max_length", "bad_rows completion_only"),
    "which rows": ("target sift avoid drop_rows target_share target_last", ""),
    "model": ("model adapter rank", "alpha dropout layers targets from_adapter dtype quantize attention"),
    "training": (
        "method lr epochs steps batch_size accumulate schedule warmup keep checkpointing seed",
        "keep_weight optim weight_decay clip group_by_length dp_epsilon dp_delta dp_clip "
        "compile sharding deterministic",
    ),
    "run": ("out resume report_to dry_run", "save_every eval_every patience log_every"),
}
_WIDE = 28  # characters of choices that stand beside an option; longer ones stand in its help


@dataclass(frozen=True)
class Flag:
    """How an option is written, as a mark in the type of its field: `Annotated[Path, Flag("return")]`.

    Attributes:
        name: Its name, if it is not that of the field.
        short: A short form, such as -o.
        positional: Whether its value stands alone, without a flag.
    """

    name: str | None = None
    short: str | None = None
    positional: bool = False


def as_flag(name: str, value: Any) -> list[str]:
    """A setting as words of a command.

    Example:
        >>> as_flag("max_length", 64), as_flag("layers", (0, -1)), as_flag("completion_only", False)
        (['--max-length', '64'], ['--layers', '0', '-1'], ['--no-completion-only'])
    """
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]


@dataclass(frozen=True)
class _Option:
    """A field, or a field of a group, as an option."""

    key: str  # such as rank or gast.select
    hint: Any
    help: str
    default: Any  # MISSING if it has none
    flag: Flag
    group: str | None = None

    @property
    def name(self) -> str:
        """The option in messages: --gast.select, or RUN if it is positional."""
        name = self.flag.name or self.key
        return name.upper() if self.flag.positional else f"--{name.replace('_', '-')}"

    @property
    def kinds(self) -> list[Any]:
        """The types that its value may have, without None."""
        return [kind for kind, _ in leaves(self.hint) if kind is not type(None)]

    def metavar(self) -> str:
        """The form of its value in the help, such as INT or {a,b}."""
        names = {str: "TEXT", Path: "PATH", int: "INT", float: "FLOAT"}
        kinds = [kind for kind in self.kinds if kind is not bool]
        items = [get_args(kind)[0] if get_origin(kind) is tuple else kind for kind in kinds]
        parts = []
        for kind in (leaf for item in items for leaf, _ in leaves(item)):
            choices = "{" + ",".join(map(str, get_args(kind))) + "}"
            name = (choices if len(choices) <= _WIDE else "NAME") if get_origin(kind) is Literal else names.get(kind)
            parts.append(name or "TEXT")
        return "|".join(dict.fromkeys(parts))

    def words(self) -> str:
        """Its help, with choices, range and default in brackets."""
        notes = []
        if self.metavar() == "NAME":
            notes.append(described(self.hint).removeprefix("a list of names, each "))
        elif bool in self.kinds and len(self.kinds) > 1:
            pass  # its help says what a value means
        elif bounds := [range for _, marks in leaves(self.hint) if (range := bounds_of(marks))]:
            notes.append(bounds[0] if len(bounds) == 1 else described(self.hint))
        if self.default not in (None, MISSING, "", (), *([False] if self.kinds != [bool] else [])):
            values = self.default if isinstance(self.default, tuple) else [self.default]
            shown = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
            notes.append(f"default: {' '.join(shown)}")
        return (self.help + (f" [{'; '.join(notes)}]" if notes else "")).replace("%", "%%")

    def add_to(self, parser: Any, hidden: bool) -> None:
        """Declare it to argparse, which keeps its text as is, without a default; a hidden one has no help."""
        many = any(get_origin(kind) is tuple for kind in self.kinds)
        common: dict[str, Any] = {"help": argparse.SUPPRESS if hidden else self.words(), "default": argparse.SUPPRESS}
        if self.flag.positional:
            parser.add_argument(self.key, nargs="*" if many else "?", metavar=self.name, **common)
            return
        names = [*([self.flag.short] if self.flag.short else []), self.name]
        if self.kinds == [bool]:
            parser.add_argument(*names, dest=self.key, action=argparse.BooleanOptionalAction, **common)
        elif bool in self.kinds:
            parser.add_argument(*names, dest=self.key, nargs="?", const=True, metavar=self.metavar(), **common)
        elif many:
            parser.add_argument(*names, dest=self.key, nargs="+", action="extend", metavar=self.metavar(), **common)
        else:
            parser.add_argument(*names, dest=self.key, metavar=self.metavar(), **common)

    def value(self, argument: Any) -> Any:
        """A value from argparse: numbers of a list may have commas between, and a single text may be no list."""
        if not isinstance(argument, list):
            return argument
        if str in self.kinds and len(argument) == 1:
            return argument[0]
        items = [leaf for kind in self.kinds if get_origin(kind) is tuple for leaf, _ in leaves(get_args(kind)[0])]
        numbers = not {*items} - {int, float}
        return [part for word in argument for part in word.split(",") if part] if numbers else argument


class _Parser(argparse.ArgumentParser):
    """A parser that raises, and never exits but after --help."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)


def parse(kind: type[T], arguments: Sequence[str], program: str) -> T:
    """Parse a command's arguments into its options.

    Options that derive from `Recipe` also take recipe files: every argument that ends in .yaml or .yml. Flags override
    them. Their `--help` shows the usual options by group, `--help-all` all.

    Args:
        kind: The dataclass to fill.
        arguments: The words after the command's name.
        program: The command in messages: "siftune train".

    Raises:
        RecipeError: An argument is unknown, or a value is not allowed; one sentence.
        SystemExit: Code 0, after `--help` or `--help-all`.
    """
    options = {option.key: option for option in _options(kind)}
    words = [_dashed(word) for word in arguments]
    files = [word for word in words if _is_recipe(word)] if issubclass(kind, Recipe) else []
    parser = _parser(kind, list(options.values()), program, every=_ALL in {*words})
    try:
        namespace, rest = parser.parse_known_intermixed_args([each for each in words if each not in files])
    except argparse.ArgumentError as error:
        name = next(part for part in str(error.argument_name).split("/") if part.startswith("--"))
        wanted = next((described(option.hint) for option in options.values() if option.name == name), "")
        raise RecipeError(f"{name} needs a value: {wanted}" if wanted else f"{name}: {error.message}") from None
    if rest:
        raise RecipeError(_unexpected(rest, options, program))
    values = {key: options[key].value(value) for key, value in vars(namespace).items() if value != []}
    flags = {key: (value, options[key].name) for key, value in values.items()}
    if issubclass(kind, Recipe):
        run = Path(str(values.get("resume", "")))
        if isinstance(values.get("resume"), str) and (run / "recipe.yaml").is_file():
            refuse_links(run)
            files = [str(run / "recipe.yaml"), *files]
            flags = {"out": (str(run), "--out"), **flags, "resume": (True, "--resume")}
        return cast(T, load_recipe(*files, kind=kind, flags=flags))
    names = {key: option.name for key, option in options.items()}
    return made(kind, flags, names, f"; see `{program} --help`")


def options_page() -> str:
    """All options of all commands in Markdown, a heading for each command, for the documentation."""
    parts = []
    for word in COMMANDS:
        kind = module_of(word).Options
        lines = [f"- `{each.name} {each.metavar()}`: {each.words().replace('%%', '%')}" for each in _options(kind)]
        parts.append(f"## siftune {word}\n\n{inspect.cleandoc(kind.__doc__ or '')}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _options(kind: type) -> list[_Option]:
    """All options of a dataclass, those of its groups last."""
    hints, lines = types_of(kind), help_of(kind)
    own, grouped = [], []
    for field in fields(cast(Any, kind)):
        hint = hints[field.name]
        if is_dataclass(hint):
            helps, types = help_of(cast(type, hint)), types_of(cast(type, hint))
            for part in fields(hint):
                key = f"{field.name}.{part.name}"
                grouped.append(_Option(key, types[part.name], helps[part.name], part.default, Flag(), field.name))
        else:
            flag = next((mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Flag)), Flag())
            own.append(_Option(field.name, hint, lines.get(field.name, ""), field.default, flag))
    return own + grouped


def _parser(kind: type, options: Sequence[_Option], program: str, every: bool) -> _Parser:
    positional = [option.name for option in options if option.flag.positional]
    places = ["[RECIPE.yaml ...]"] if issubclass(kind, Recipe) else positional
    recipe = issubclass(kind, Recipe)
    parser = _Parser(
        prog=program,
        usage=" ".join([program, *places, "[OPTIONS]", "[--json]"]),
        description=_about(kind),
        epilog=f"`{program} {_ALL}` lists all options, and those of each method." if recipe and not every else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    shown = "show all options, and those of each method, and exit" if recipe else argparse.SUPPRESS
    parser.add_argument(_ALL, action="help", help=shown)
    rest = {option.key: option for option in options}
    for title, (usual, rare) in _GROUPS.items() if recipe else ():
        group = parser.add_argument_group(title)
        for key in f"{usual} {rare}".split():
            if key in rest:
                rest.pop(key).add_to(group, hidden=key in rare.split() and not every)
    methods: dict[str, Any] = {}
    for option in rest.values():
        if option.group and option.group not in methods:
            methods[option.group] = parser.add_argument_group(f"with --method {_methods_with(option.group)}")
        option.add_to(methods[option.group] if option.group else parser, hidden=bool(option.group) and not every)
    return parser


def _methods_with(group: str | None) -> str:
    """The methods that take a group's settings."""
    return " or ".join(name for name, method in METHODS.items() if any(p.settings.group == group for p in method.parts))


def _about(kind: type) -> str:
    """The text above a command's options; with recipes also the methods, a line each."""
    parts = [inspect.cleandoc(kind.__doc__ or "")]
    if issubclass(kind, Recipe):
        width = max(map(len, METHODS))
        parts.append("\n".join(["methods:", *(f"  {name:<{width}}  {m.line}" for name, m in METHODS.items())]))
    parts.append("--json prints the result as one JSON object, alone on standard output.")
    wide = max(40, shutil.get_terminal_size().columns - 2)
    paragraphs = []
    for paragraph in "\n\n".join(parts).replace("%", "%%").split("\n\n"):
        listed = "\n " in paragraph  # a list of methods keeps its lines, prose flows
        lines = paragraph.split("\n") if listed else [" ".join(paragraph.split())]
        filled = (textwrap.fill(line, wide, subsequent_indent="    " * line.startswith(" ")) for line in lines)
        paragraphs.append("\n".join(filled))
    return "\n\n".join(paragraphs)


def _dashed(word: str) -> str:
    """A flag with hyphens in its name: --batch_size=3 -> --batch-size=3."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _is_recipe(word: str) -> bool:
    return not word.startswith("-") and Path(word).suffix in (".yaml", ".yml")


def _unexpected(rest: Sequence[str], options: dict[str, _Option], program: str) -> str:
    """The sentence on an argument that no option takes."""
    word = next((word for word in rest if word.startswith("-")), rest[0])
    if word.startswith("-"):
        flag = word.partition("=")[0]
        key = flag.removeprefix("--").replace("-", "_")
        if key == "seed":
            return f"{flag}: `{program}` takes no seed"
        needed, advice = _INSTEAD.get(key, (None, ""))
        if advice and (needed is None or needed in options):
            return f"unknown option {flag} of `{program}`; {advice}"
        names = {option.name.removeprefix("--").replace("-", "_"): option.name for option in options.values()}
        close = nearest(key.removeprefix("no_"), [*names, *(k for k in options if k not in names)])
        flags = " or ".join(names.get(one) or options[one].name for one in close.split(" or ")) if close else None
        return (
            f"unknown option {flag} of `{program}`; {f'did you mean {flags}?' if flags else f'see `{program} --help`'}"
        )
    if "train" in options and Path(word).suffix in _DATA:
        return f"{word} follows no option; did you mean --train {word}?"
    if "resume" in options and (Path(word) / "recipe.yaml").is_file():
        return f"{word} follows no option; did you mean --resume {word}?"
    return f"{word} is not expected here; see `{program} --help`"
