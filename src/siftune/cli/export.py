"""`siftune export`: merge an adapter into its base model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from siftune.errors import ModelError


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
    import shutil

    from siftune.evaluate.subject import find_subject, load_subject

    subject = find_subject(options.run)
    if subject.adapter is None:
        raise ModelError(f"{options.run} holds no adapter; give a run folder, or a folder in PEFT's format.")
    out = Path(options.out) if options.out else Path(options.run) / "merged"
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} is not empty; give another folder with --out.")
    subject = replace(subject, base=options.base or subject.base)
    model, tokenizer = load_subject(subject, options.dtype, exact=True)
    merged = model.merge_and_unload(safe_merge=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    logging.getLogger("siftune").info("merged model in %s", out)
    return {"model": out, "adapter": subject.adapter}
