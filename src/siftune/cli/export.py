"""`siftune export`: put what was trained into its base model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from siftune.base.errors import AdapterError, ModelError
from siftune.base.files import new_folder, refuse_full
from siftune.base.settings import CONFIG, Validated
from siftune.cli.options import Flag
from siftune.cli.paths import refuse_unknown

if TYPE_CHECKING:
    from siftune.cli.subjects import Subject


@dataclass(config=CONFIG)
class Options(Validated):
    """Merge what a run has trained into its base model. The result is an ordinary model."""

    run: Annotated[str, Flag("run", positional=True)]
    """Run folder, or a folder with an adapter in PEFT's format or with tuned layers."""
    out: str | None = None
    """Folder of the merged model; RUN/merged if not given."""
    base: str | None = None
    """Base model: a folder, hub id or smollm2; the one that the adapter was trained on if not given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the merged weights; auto: the checkpoint's, or float32 on a processor that lacks it."""


def run(options: Options) -> dict[str, Any]:
    """Merge and save."""
    refuse_unknown(options.run)  # this and the folder, before torch is imported
    out = Path(options.out or Path(options.run) / "merged").expanduser()
    if options.out is None and (out / "config.json").is_file():
        raise ModelError(f"{out} is an earlier export: remove it, or name another folder with --out")
    refuse_full(out)
    import logging

    from siftune.base.environment import ran_out
    from siftune.cli.subjects import find_subject, kind_of_subject, load_subject, take_template
    from siftune.models.load import quiet_bars
    from siftune.models.save import save_model, save_tokenizer

    subject = find_subject(options.run, base=options.base)
    if (kind := kind_of_subject(subject)) is not None:
        kind.refuse_export(subject.name)
    if subject.adapter is None:
        raise ModelError(f"{options.run} holds no adapter; give a run folder, or a folder in PEFT's format")
    with new_folder(out) as partial:
        model, tokenizer = load_subject(subject, options.dtype, exact=True)
        _refuse_unmergeable(model, subject)
        take_template(subject.adapter, tokenizer)
        try:
            # layers that were tuned themselves are in place already
            merged = model.merge_and_unload(safe_merge=True) if hasattr(model, "merge_and_unload") else model
        except (ValueError, NotImplementedError, RuntimeError) as error:  # of PEFT: NaN, infinity, kinds that stay
            if ran_out(error):
                raise
            raise AdapterError(f"the adapter in {subject.adapter} cannot be merged: {error}") from error
        with quiet_bars():
            save_model(merged, partial)
        save_tokenizer(tokenizer, partial)
        _write_papers(subject, tokenizer, partial, out)
    logging.getLogger("siftune").info("merged model in %s", out)
    return {"model": out, "adapter": subject.adapter}


def _refuse_unmergeable(model: Any, subject: "Subject") -> None:
    """Refuse a quantized base, and adapters on a matrix that the embeddings and the head share."""
    from siftune.models.adapters.attach import adapts_shared_ends, is_quantized

    if is_quantized(model):
        raise ModelError(
            f"{subject.base} is quantized, so that nothing can be merged into it: name the model that it was made from "
            "with --base"
        )
    if adapts_shared_ends(model):
        raise AdapterError(
            f"the adapter in {subject.adapter} is on the embeddings or the head, which share a matrix in this model, "
            "so that no merged model does the same: use it beside its base"
        )


def _write_papers(subject: "Subject", tokenizer: Any, folder: Path, out: Path) -> None:
    """Write a card to the folder that will be `out`, and the base model's licence and notice beside it."""
    import shutil

    from siftune.data.encode import writes_chat
    from siftune.models.source import origin_of
    from siftune.train.folder.card import merged_card

    origin = origin_of(subject.base)
    chat = writes_chat(subject.recipe.template if subject.recipe else "auto", tokenizer)
    (folder / "README.md").write_text(merged_card(subject.recipe, origin, out.absolute(), chat), encoding="utf-8")
    for paper in origin.papers:
        shutil.copyfile(paper, folder / paper.name)
