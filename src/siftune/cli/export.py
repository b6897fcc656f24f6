"""`siftune export`: merge an adapter into its base model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from siftune.errors import ModelError


@dataclass
class Options:
    """Merge a run's adapter into its base model, and save an ordinary model that needs neither PEFT nor siftune."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, or a folder with an adapter in PEFT's format."""
    out: str | None = None
    """Folder of the merged model; RUN/merged if not given."""
    base: str | None = None
    """Base model: a folder, hub id or smollm2; the one that the adapter was trained on if not given."""
    dtype: str = "auto"
    """Number format of the merged weights; auto keeps that of the base."""


def run(options: Options) -> dict[str, Any]:
    """Merge and save."""
    import logging

    from siftune.models.saved import adapter_folder, load_tuned

    given = Path(options.run)
    out = Path(options.out) if options.out else given / "merged"
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} is not empty; give another folder with --out.")
    adapter = adapter_folder(given)
    model, tokenizer = load_tuned(adapter, options.base, options.dtype)
    merged = model.merge_and_unload(safe_merge=True)
    partial = out.with_name(f".{out.name}.partial")
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    logging.getLogger("siftune").info("merged model in %s", out)
    return {"model": out, "adapter": adapter}
