"""Calibration texts that the base model writes itself, so that nobody's rows calibrate a kit.

The base samples more texts than needed, freely or after prompts, and those with the highest loss per sampled token are
left out. Self-calibration is from pruning and quantisation (arXiv 2410.17170; 2410.17711 filters by perplexity). Ours:
the use for emulators, and the share that is left out.

The texts stay in siftune's cache folder, so that an interrupted command and a second kit do not sample again. Their
folder is closed to other users, and each file has a SHA-256, by which damage is noticed *(ours)*.
"""

import json
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.errors import DataError, InputError
from siftune.base.files import Progress, write_beside
from siftune.base.json_files import hash_of_json, read_json
from siftune.data.encode import Encoder, writes_chat
from siftune.data.rows import Row
from siftune.data.sampled_texts import TokenRow, sample_texts
from siftune.data.tokens import tokenize_rows
from siftune.evaluate.likelihood import row_nll
from siftune.models.smollm2 import cache_root
from siftune.offsite.kit.manifest import fingerprint

logger = logging.getLogger(__name__)

_RULE = 1  # by which texts are sampled and left out
_LEAST = 4  # tokens to sample after a prompt
_UNCUT = 1 << 20  # tokens that no row has


class _Cached(BaseModel):
    """A file of texts in the cache."""

    texts: list[TokenRow]
    sha256: str


def own_texts(
    model: PreTrainedModel,
    count: int,
    length: int,
    seed: int,
    prompts: Sequence[Sequence[int]] = (),
    progress: Progress | None = None,
) -> list[TokenRow]:
    """Have a model write texts without those that it finds least likely itself, or read them from the cache.

    Args:
        model: The base model, in memory.
        count: Number of texts.
        length: Tokens of a text, with its prompt or first token, at most.
        seed: Seed; on the same hardware, the same texts follow from it.
        prompts: Token ids of prompts, from `prompt_ids`: each text begins with one, in their order and repeatedly.
            Without any, texts begin with the model's first token.
        progress: Receives the number of sampled and of scored texts.

    Returns:
        Rows with `input_ids` and `labels`: the sampled tokens, -100 before them.

    Raises:
        UnsupportedError: There are no prompts, and the model's config has no first token.
    """
    facts = [_RULE, fingerprint(model), str(model.dtype), count, length, seed, prompts]
    path = cache_root() / "own_texts" / f"{hash_of_json(facts)[:32]}.json"
    if (known := _read(path)) is not None:
        logger.info("%d texts that the model wrote are in %s", count, path)
        return known
    begins = [prompts[place % len(prompts)] for place in range(samples_of(count))] if prompts else ()
    texts = sample_texts(model, samples_of(count), length, seed, begins, progress)
    pairs = [(text["input_ids"], text["labels"]) for text in texts]
    scores = row_nll(model, pairs, progress=progress, stage="scoring texts")
    likely = np.argsort(scores.nll / scores.tokens, kind="stable")[:count]
    texts = [texts[place] for place in sorted(likely.tolist())]
    _write(path, texts)
    return texts


def samples_of(count: int) -> int:
    """Number of texts to sample for `count`: a third more, of which the least likely are left out (ours)."""
    return count + -(-count // 3)


def prompt_ids(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, length: int, template: str | Path = "auto"
) -> list[list[int]]:
    """Token ids of the rows' prompts, up to where the answer begins; without those that leave too little to sample.

    Args:
        rows: Rows; their completions are not used.
        tokenizer: The model's tokenizer.
        length: Tokens of a text, with its prompt, at most.
        template: As for `tokenize_rows`.

    Raises:
        DataError: A row has no prompt, or every prompt is too long; the message names a row.
    """
    found = _prompts(rows, tokenizer, template)
    short = [ids for ids in found if len(ids) + _LEAST <= length]
    if not short:
        least, place = min((len(ids), place) for place, ids in enumerate(found))
        raise DataError(
            f"--max-length {length} leaves fewer than {_LEAST} tokens after every prompt; the shortest, "
            f"{rows[place].origin}, takes {least}: raise it to {least + _LEAST} or more, or give shorter prompts"
        )
    if len(short) < len(found):
        logger.warning(
            "%d of %d prompts are left out: they leave fewer than %d tokens of --max-length %d to sample",
            len(found) - len(short), len(found), _LEAST, length,
        )  # fmt: skip
    return short


def usual_length(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, most: int, template: str | Path = "auto"
) -> int:
    """The length in tokens that three quarters of the rows have at most, but no more than `most` *(ours)*.

    So texts are like rows of the tuning. A row with a shorter answer than what is sampled at least counts as longer.
    With a chat template it is `most`: the model answers in sentences there, for which short rows leave no room.

    Raises:
        DataError: A row has no prompt; the message names it.
    """
    if writes_chat(template, tokenizer):
        return most
    complete: list[int] = tokenize_rows(rows, tokenizer, _UNCUT, template, completion_only=False)["length"]
    prompts = _prompts(rows, tokenizer, template)
    lengths = sorted(max(length, len(ids) + _LEAST) for length, ids in zip(complete, prompts, strict=True))
    return min(lengths[(3 * len(lengths) - 1) // 4], most)


def _prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: str | Path) -> list[list[int]]:
    encoder = Encoder(tokenizer, template)
    for row in rows:
        if not row.prompt:
            raise DataError(f"{row.origin} has no prompt, with which a text could begin; remove the row")
    prompts = [encoder.prompt(row) for row in rows]
    for row, ids in zip(rows, prompts, strict=True):
        if not ids:
            raise DataError(f"the prompt of {row.origin} has no token, with which a text could begin; remove the row")
    return prompts


def _read(path: Path) -> list[TokenRow] | None:
    """Texts in the cache; None if there are none, or if they may not be those that the model wrote."""
    if not path.is_file():
        return None
    again = "the model writes its texts again"
    if not _is_private(path.parent):
        logger.warning("other users of this machine may write to %s; %s", path.parent, again)
        return None
    try:
        cached = read_json(path, _Cached, again)
    except InputError as error:
        logger.warning("%s", error)
        return None
    if cached.sha256 != _digest(path, cached.texts):
        logger.warning("%s is damaged; %s", path, again)
        return None
    return cached.texts


def _write(path: Path, texts: Sequence[TokenRow]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)  # a kit is made with the texts, unseen
        with write_beside(path) as [beside]:
            beside.write_text(json.dumps({"texts": texts, "sha256": _digest(path, texts)}), encoding="utf-8")
    except OSError as error:
        logger.warning("the model's texts are not cached: %s cannot be written (%s)", path, error.strerror or error)


def _digest(path: Path, texts: Sequence[TokenRow]) -> str:
    """SHA-256 of texts and of their file's name, which depends on all that they follow from."""
    return hash_of_json([path.stem, texts])


def _is_private(folder: Path) -> bool:
    """Whether only this user can write to a folder. Windows has no such modes, and every folder counts."""
    state = folder.stat()
    return os.name != "posix" or (state.st_uid == os.getuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
