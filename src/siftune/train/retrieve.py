"""Training rows that are chosen before training: those most like known rows, by the untrained model's hidden states."""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from siftune.base.errors import RecipeError
from siftune.base.files import Progress
from siftune.base.ranks import launch_size
from siftune.data.target import TARGET, repeats, sources
from siftune.data.tokenize import ROW, Collator, numbered
from siftune.evaluate.embeddings import embed, most_alike, similarity
from siftune.recipe.schema import Recipe
from siftune.train.prepare import Prepared


def retrieved(
    recipe: Recipe, model: nn.Module, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, progress: Progress
) -> Prepared:
    """Keep a recipe's share of the training rows; a target's rows stay, repeated up to their share of what is kept.

    Of the rows, `support` are the known ones. The base model goes to the accelerator, where there is one.

    Raises:
        RecipeError: The run has several processes, or there is nothing to choose from.
    """
    if not recipe.retrieve:
        return prepared
    if launch_size() > 1:
        raise RecipeError(
            "retrieve chooses rows by one model, before training, in one process: start it without torchrun, or write "
            "the rows to a file first"
        )
    progress("comparing rows with those that are known", 0, 0)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    data, collate = prepared.data["train"], Collator(tokenizer.pad_token_id)
    fixed = [number for number, source in enumerate(sources(prepared.rows["train"])) if _is_target(recipe, source)]
    others = sorted(set(range(len(data))) - set(fixed))
    if not others:
        raise RecipeError("retrieve chooses among training rows that are not the target's, and there are none")
    known_KH = embed(model, prepared.data["support"], collate, recipe.batch_size)
    scores_R = similarity(embed(model, data.select(others), collate, recipe.batch_size), known_KH)
    chosen = [others[place] for place in most_alike(scores_R, recipe.retrieve)]
    if fixed and recipe.target_share:  # they go round, and come last: so many of the last hold every one of them
        fixed = fixed[-repeats(len(chosen), len(known_KH), recipe.target_share) :]
    kept = sorted([*fixed, *chosen])
    rows = [prepared.rows["train"][number] for number in kept]
    parts = {**prepared.data, "train": numbered(data.select(kept).remove_columns(ROW))}
    return replace(prepared, rows={**prepared.rows, "train": rows}, data=parts, kept=tuple(kept))


def _is_target(recipe: Recipe, source: str) -> bool:
    return recipe.target is not None and source == TARGET
