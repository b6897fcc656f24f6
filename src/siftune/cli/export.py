"""`siftune export`: merge an adapter into its base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from siftune.errors import AdapterError, ModelError


@dataclass
class Options:
    """Merge a run's adapter into its base model, and save an ordinary model that needs neither PEFT nor siftune."""

    run: Positional[str]
    """Run folder, or a folder with an adapter in PEFT's format."""
    out: str | None = None
    """Folder of the merged model; RUN/merged if not given."""
    base: str | None = None
    """Base model: a folder, hub id or smollm2; the one that the adapter was trained on if not given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the merged weights; auto keeps that of the base."""


def run(options: Options) -> dict[str, Any]:
    """Merge and save."""
    import logging

    from siftune.evaluate.subject import find_subject, load_subject

    subject = find_subject(options.run)
    if subject.adapter is None:
        raise ModelError(f"{options.run} holds no adapter; give a run folder, or a folder in PEFT's format.")
    out = Path(options.out or Path(options.run) / "merged").expanduser()
    subject = replace(subject, base=options.base or subject.base)
    with _beside(out) as partial:
        model, tokenizer = load_subject(subject, options.dtype, exact=True)
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # PEFT looks for NaN and infinity
            raise AdapterError(f"the adapter in {subject.adapter} cannot be merged: {error}") from error
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    logging.getLogger("siftune").info("merged model in %s", out)
    return {"model": out, "adapter": subject.adapter}


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Give a folder to write to beside `out`; it becomes `out` at the end, or is removed after an error.

    Raises:
        ModelError: `out` is in use, or cannot be made; before anything is loaded.
    """
    import shutil

    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.exists() and any(out.iterdir()):
            raise ModelError(f"{out} is not empty; give another folder with --out.")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ModelError(f"{out} cannot be written to ({error.strerror}); give another folder with --out.") from error
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
