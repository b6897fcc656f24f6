"""`siftune ask`: answers of a tuned model and of its base model to prompts."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic.dataclasses import dataclass

from siftune.base.errors import DataError, RecipeError
from siftune.base.settings import CONFIG, Columns, Count, Template, Validated
from siftune.base.text import counted, visible
from siftune.cli.options import Flag
from siftune.cli.paths import refuse_unknown

if TYPE_CHECKING:
    from rich.console import Console

    from siftune.cli.subjects import Subject
    from siftune.data.rows import Row
    from siftune.evaluate.measure import Answer

_WIDE = 100  # columns of a terminal on which two answers stand side by side


@dataclass(config=CONFIG)
class Options(Validated):
    """Show the answers of a tuned model and of its base model to a prompt, with the likeliest token at each step.

    The prompt stands after the run, or comes from standard input; --file has several.
    """

    run: Annotated[str, Flag(positional=True)]
    """What to ask: a run folder, a PEFT adapter folder, a kit, or a model (folder, hub id, smollm2), which gives one
    answer."""
    prompt: Annotated[str | None, Flag(positional=True)] = None
    """The prompt, in quotation marks; all of standard input if neither it nor --file is given."""
    file: str | None = None
    """Prompts instead: a .txt file with one per line, or a .jsonl, .json, .csv or .parquet file or hub id (whose split
    is test if none is named) with rows, whose completions are not read."""
    columns: Columns = ()
    """Other names of columns of --file, such as prompt=question."""
    limit: Count | None = None
    """Ask at most N prompts of --file."""
    max_new_tokens: Count = 256
    """Longest answer in tokens."""
    template: Template | None = None
    """Chat template: that of the run, or auto, if not given."""
    base: str | None = None
    """Base of the run, if it is not where the run says: a folder, hub id, smollm2 or a kit."""
    batch_size: Count = 16
    """Prompts in a forward pass."""


def run(options: Options) -> dict[str, Any]:
    """Ask the base model and the tuned one, show the answers, and return them."""
    refuse_unknown(options.run)  # before torch is imported
    from siftune.base.stages import text_console
    from siftune.cli.subjects import find_subject, template_of
    from siftune.data.rows import text_of

    # everything that can be refused without loading a model comes first
    subject = find_subject(options.run, base=options.base)
    template = template_of(subject, options.template)
    rows = _rows(options, subject.recipe.columns if subject.recipe is not None else ())
    base, tuned = _ask(subject, rows, template, options)
    prompts = [text_of(row).prompt for row in rows]
    labels = ("answer",) if tuned is None else ("base", "tuned")
    columns = [base] if tuned is None else [base, tuned]
    _show(prompts, labels, columns, text_console())
    if cut := sum(not answer.complete for column in columns for answer in column):
        logging.getLogger(__name__).warning(
            "%s cut at --max-new-tokens %d",
            *(f"{counted(cut, 'answer')} {'is' if cut == 1 else 'are'}", options.max_new_tokens),
        )
    answers = [
        {"prompt": prompt, "base": base[i].text, "tuned": None if tuned is None else tuned[i].text}
        for i, prompt in enumerate(prompts)
    ]
    return {"run": subject.name, "model": subject.base, "answers": answers}


def _rows(options: Options, columns: Columns) -> "list[Row]":
    """The prompts; `columns` are those of the run, if none are given."""
    from siftune.data.read import load_rows
    from siftune.data.rows import Row
    from siftune.data.turns import Message

    if options.file is not None:
        if options.prompt is not None:
            raise RecipeError("a prompt and --file are given: give one of them")
        return load_rows(options.file, "test", options.limit, options.columns or columns, questions=True)
    if options.columns or options.limit:
        raise RecipeError("--columns and --limit are for the rows of --file: leave them out, or give --file FILE")
    text, origin = options.prompt, "command line"
    if text is None:
        origin = "standard input"
        try:
            text = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 text: byte {error.start} is invalid; convert it") from None
    if not text.strip():
        raise RecipeError(
            "there is no prompt: give a text after the run, in quotation marks, on standard input, or with --file FILE"
        )
    return [Row((Message("user", text),), "", origin)]


def _ask(
    subject: "Subject", rows: "list[Row]", template: str | Path, options: Options
) -> "tuple[list[Answer], list[Answer] | None]":
    """Answers of the base model; and of the tuned one, if something was trained."""
    from siftune.base.stages import stages, text_console
    from siftune.cli.subjects import load_base, put_on, take_template
    from siftune.data.encode import Encoder
    from siftune.evaluate.measure import answers
    from siftune.evaluate.prepare import open_questions
    from siftune.models.attention import short_rows
    from siftune.models.modules import check_window

    with stages(text_console(stderr=True)) as progress, short_rows():

        def answers_of(model: Any, name: str) -> "list[Answer]":
            return answers(
                model,
                questions,
                tokenizer,
                options.batch_size,
                lambda what, *count: progress(f"{name}: {what}", *count),
            )

        progress(f"loading {subject.name}", 0, 0)
        model, tokenizer = load_base(subject, "auto" if subject.recipe is None else subject.recipe.dtype)
        if options.template is None and subject.adapter is not None and subject.is_ordinary:
            take_template(subject.adapter, tokenizer)
        questions = open_questions(rows, Encoder(tokenizer, template), options.max_new_tokens)
        for row, ids in zip(rows, questions.prompts_ids, strict=True):
            what = f"{row.origin}: the prompt with {counted(options.max_new_tokens, 'new token')}"
            check_window(model, len(ids) + options.max_new_tokens, what, "shorten it, or lower --max-new-tokens")
        base = answers_of(model, subject.base)
        if subject.adapter is None:
            return base, None
        return base, answers_of(put_on(model, subject), subject.name)


def _show(prompts: list[str], labels: tuple[str, ...], columns: "list[list[Answer]]", console: "Console") -> None:
    """Print the answers to each prompt: side by side on a wide terminal, otherwise below each other."""
    from rich.table import Table as Grid
    from rich.text import Text

    from siftune.report.table import Table, print_table

    for number, prompt in enumerate(prompts):
        texts = [column[number].text.strip() for column in columns]
        if number:
            console.print()
        if len(texts) > 1 and console.is_terminal and console.width >= _WIDE:
            print_table(Table(labels, [texts], prompt, words=range(len(texts))), console)
            continue
        lines = [("prompt", prompt.strip()), *zip(labels, texts, strict=True)]
        if console.is_terminal:
            grid = Grid.grid(padding=(0, 2, 0, 0))
            for label, text in lines:
                grid.add_row(label, Text(visible(text)))
            console.print(grid)
        else:
            for label, text in lines:
                indented = visible(text).replace("\n", "\n" + " " * 8)
                console.print(f"{label:<6}  {indented}".rstrip(), markup=False)
