"""Similarity of a pool's prompts to those of the target, under the base model.

Embeddings of the pool are kept in a file until all of them are there, since the mean of all is subtracted from each. An
interrupted call continues after the last chunk of them.
"""

import hashlib
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, FiniteFloat

from siftune.base.errors import DataError
from siftune.base.ranks import from_first, mean_over_ranks, rank, wait_for_all, world_size
from siftune.base.stages import stages
from siftune.data.rows import Row
from siftune.models.attention import short_rows
from siftune.models.modules import check_window, model_device
from siftune.sifting.similarity import Floats, embed, nearest, nearest_other, prompt_of
from siftune.sifting.work import PROMPTS, SIMILAR, Work, base_model, rows_at_once
from siftune.train.guards.memory import free
from siftune.train.prepare import Prepared

_CHUNK = 512  # prompts that are embedded before their file grows
_DIGEST = hashlib.sha256().digest_size  # bytes


class _Similar(BaseModel):
    """Similarities, as the line of their file."""

    pool: list[FiniteFloat]
    target: list[FiniteFloat]


def similarities(work: Work, prepared: Prepared, part: str) -> tuple[Floats, Floats]:
    """Compare the prompts of the pool with those of the target.

    Args:
        work: The sifting.
        prepared: The rows.
        part: Name of the target's part of them.

    Returns:
        (R,) similarity of each row of the pool to the nearest prompt of the target, and (K,) of each different prompt
        of the target to the nearest other one.

    Raises:
        DataError: An embedding is not finite.
    """
    lines = from_first(lambda: work.folder.lines(SIMILAR, _Similar))
    if not lines:
        model, rows = base_model(work), prepared.rows[part]
        longest = max(max(prepared.data[name]["length"]) for name in ("train", part))
        check_window(model, longest, "a row of the pool or the target")
        texts = _prompts(prepared, part, slice(0, len(rows)))
        different = dict(zip(map(tuple, texts), rows, strict=True))
        few_KH = embed(model, [*different], rows_at_once(work.recipe))
        _refuse_broken(few_KH, [*different.values()])
        _embed_pool(work, prepared, model, few_KH.shape[1])
        del model
        free()
        if rank() == 0:
            work.folder.append(SIMILAR, _compared(work, prepared, few_KH.float(), {*different}).model_dump())
        wait_for_all()
        lines = from_first(lambda: work.folder.lines(SIMILAR, _Similar))
    if rank() == 0:
        (work.folder.path / PROMPTS).unlink(missing_ok=True)
    return np.array(lines[0].pool, np.float64), np.array(lines[0].target, np.float64)


def _embed_pool(work: Work, prepared: Prepared, model: torch.nn.Module, width: int) -> None:
    """Add the embeddings of the pool's prompts to their file, chunk by chunk, after those that are there."""
    rows, path = prepared.rows["train"], work.folder.path / PROMPTS
    begin = from_first(lambda: sum(len(chunk_RH) for chunk_RH in _chunks(path, len(rows), width)))
    if rank() == 0:
        with path.open("ab") as file:
            file.truncate(begin * width * np.dtype(np.float32).itemsize + -(-begin // _CHUNK) * _DIGEST)
    with short_rows(), stages(work.console) as progress:
        for start in range(begin, len(rows), _CHUNK):
            progress("similarity of the prompts", start, len(rows))
            chunk = slice(start, min(start + _CHUNK, len(rows)))
            texts = _prompts(prepared, "train", chunk)
            own = slice(rank(), None, world_size())  # each rank has a part of the texts
            part_RH = torch.zeros(len(texts), width, dtype=torch.float64)
            if texts[own]:
                part_RH[own] = embed(model, texts[own], rows_at_once(work.recipe)).double()
            part_RH = mean_over_ranks(part_RH, model_device(model)) * world_size()
            _refuse_broken(part_RH, rows[chunk])
            if rank() == 0:
                content = part_RH.float().numpy().tobytes()
                with path.open("ab") as file:
                    file.write(content + hashlib.sha256(content).digest())


def _chunks(path: Path, count: int, width: int) -> Iterator[NDArray[np.float32]]:
    """Read embeddings chunk by chunk, up to the first chunk that is missing or damaged; (C, H) each.

    Each chunk is followed by its SHA-256.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for start in range(0, count, _CHUNK):
            content = file.read(min(_CHUNK, count - start) * width * np.dtype(np.float32).itemsize)
            if file.read(_DIGEST) != hashlib.sha256(content).digest():
                return
            yield np.frombuffer(content, np.float32).reshape(-1, width)


def _refuse_broken(states_RH: torch.Tensor, rows: Sequence[Row]) -> None:
    finite_R = states_RH.isfinite().all(1)
    if not bool(finite_R.all()):
        place = rows[int(finite_R.int().argmin())].origin
        raise DataError(f"the hidden states of {place} are not finite: leave the row out, or give --dtype float32")


def _compared(work: Work, prepared: Prepared, few_KH: torch.Tensor, target: Set[tuple[int, ...]]) -> _Similar:
    """The similarities of the pool's prompts, whose embeddings are in their file; 1 of those that are in the target.

    The embedding of a prompt that all rows share is rounding alone, once the mean is subtracted.
    """
    path, width, count = work.folder.path / PROMPTS, few_KH.shape[1], len(prepared.rows["train"])
    sum_H = sum((chunk_RH.sum(0, dtype=np.float64) for chunk_RH in _chunks(path, count, width)), np.zeros(width))
    mean_H = torch.from_numpy(sum_H / count).float()
    similar: list[float] = []
    for chunk_RH in _chunks(path, count, width):
        texts = _prompts(prepared, "train", slice(len(similar), len(similar) + len(chunk_RH)))
        near = nearest(torch.tensor(chunk_RH), few_KH, mean_H).tolist()
        similar += [1.0 if tuple(text) in target else value for text, value in zip(texts, near, strict=True)]
    return _Similar(pool=similar, target=nearest_other(few_KH, mean_H).tolist())


def _prompts(prepared: Prepared, part: str, chunk: slice) -> list[Sequence[int]]:
    """Token ids of the prompts of rows; all token ids of a row of text, which may begin without a label."""
    rows, columns = prepared.rows[part][chunk], prepared.data[part][chunk]
    pairs = zip(columns["input_ids"], columns["labels"], strict=True)
    return [prompt_of(*pair) if row.prompt else pair[0] for row, pair in zip(rows, pairs, strict=True)]
