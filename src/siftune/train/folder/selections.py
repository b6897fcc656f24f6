"""What selection chose in a run, step by step: written while it trains, in few bytes, and read again for reports.

    RUN/selection.bin
      the 8 bytes b"siftsel1", then frames: kind (1 byte), length of the body (uint32), body; little-endian throughout

    kind  body
    N     the training rows' sources: JSON list of their names, a line break, and the number of each row's name
          (uint16), deflated; holds for what follows it
    L     a step's layers: JSON, as `LayerChoice.record`
    S     a batch's rows: step (uint32), batch, units U, samples S, rows R (uint16 each), scored (uint8); numbers of the
          units' layers (U int16); who follows whom (U·S bits); numbers of the rows in the training data (R uint32); and
          where they were scored, of every unit a power of two (U int8) and its scores as shares of it (U·S float16)

With 16 rows and 30 layers a batch takes 1,192 bytes, scores included. A score keeps 11 bits, down to 2⁻¹⁴ of the
largest in its layer. A process that was killed leaves at most the last frame incomplete: reading stops before it, and
`cut_selection` takes it off before more is written. Runs of 0.1 have selection.jsonl in its place, which is read as
well.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftune.base.errors import InputError
from siftune.methods.drivers.layer_driver import LayerChoice
from siftune.methods.drivers.sample_choice import SampleChoice

SELECTION, OF_0_1 = "selection.bin", "selection.jsonl"

_MAGIC = b"siftsel1"
_FRAME = struct.Struct("<cI")
_BATCH = struct.Struct("<IHHHHB")
_NAMES = 2**16  # sources that can be told apart
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, struct.error, zlib.error,
)  # fmt: skip
_DEEPEST = 2**10  # layers that a model may have: a stranger's record could name any
_MOST = 2**26  # bytes that their numbers may take: a stranger's record could unfold to any size


@dataclass(frozen=True)
class LayersOfStep:
    """The layers that trained in a step."""

    step: int  # optimizer steps done before it
    layers: tuple[int, ...]
    importance: NDArray[np.float64] | None = None  # (L,) logits, where they had moved
    losses: tuple[float, ...] = ()  # losses of the candidate sets, where they were compared before this step


@dataclass(frozen=True, eq=False)
class RowsOfBatch:
    """The rows that each layer followed in a batch."""

    step: int  # optimizer steps done before it
    batch: int  # its number in the step
    layers: tuple[int, ...]  # (U,) numbers of the layers; -1 where one choice is for all
    rows: tuple[int, ...]  # (S,) numbers of its rows among the training rows; empty where they are not numbered
    sources: tuple[str, ...]  # where these rows are from; empty where that was not recorded
    followed: NDArray[np.bool_]  # (U, S) who follows whom
    scores: NDArray[np.float32] | None  # (U, S); None where none were kept or needed


class SelectionFile:
    """Writes a run's selection record; `sources` says where each training row is from, `scores` keeps those of rows."""

    def __init__(self, folder: Path, sources: Sequence[str], scores: bool) -> None:
        self._path = folder / SELECTION
        self._sources = sources
        self._scores = scores
        self._begun = False

    def layers(self, choice: LayerChoice) -> None:
        """Add a step's layers."""
        self._append([_frame(b"L", json.dumps(choice.record()).encode())])

    def rows(self, choice: SampleChoice, rows: Sequence[int]) -> None:
        """Add the choice in a batch, whose rows have these numbers among the training rows."""
        frames = [] if self._begun else [_frame(b"N", _names(self._sources))]
        self._append([*frames, _frame(b"S", _batch(choice, rows, self._scores))])
        self._begun = True

    def _append(self, frames: Sequence[bytes]) -> None:
        with self._path.open("ab") as file:
            file.write(b"".join(frames if file.tell() else [_MAGIC, *frames]))


def read_selection(folder: Path) -> Iterator[LayersOfStep | RowsOfBatch]:
    """Read a run's selection record, in the order in which it was written; nothing where the run chose nothing.

    Raises:
        InputError: The record is damaged, or not of this version.
    """
    try:
        if (folder / OF_0_1).is_file():
            yield from _of_0_1(folder / OF_0_1)
        if (folder / SELECTION).is_file():
            yield from _records(folder / SELECTION)
    except _DAMAGE as error:
        raise InputError(f"the selection record in {folder} is damaged ({error}): move it elsewhere") from error


def _records(path: Path) -> Iterator[LayersOfStep | RowsOfBatch]:
    names: list[str] = []
    numbers: NDArray[np.uint16] = np.zeros(0, np.uint16)
    for _, kind, body in _frames(path):
        if kind == b"N":
            names, numbers = _parse_names(body)
        elif kind == b"L":
            yield _parse_layers(json.loads(body))
        elif kind == b"S":
            yield _parse_batch(body, names, numbers)


def cut_selection(folder: Path, step: int) -> None:
    """Take off what was chosen from `step` on, which a resumed run will write again, and a frame that is not whole."""
    path = folder / SELECTION
    if not path.is_file():
        return
    end = len(_MAGIC) if path.stat().st_size >= len(_MAGIC) else 0
    for after, kind, body in _frames(path):
        if kind in b"LS" and _step(kind, body) >= step:
            break
        end = after
    with path.open("r+b") as file:
        file.truncate(end)


def _frame(kind: bytes, body: bytes) -> bytes:
    return _FRAME.pack(kind, len(body)) + body


def _frames(path: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """Where each whole frame ends, its kind and its body."""
    data = path.read_bytes()
    if data[: len(_MAGIC)] != _MAGIC[: len(data)]:
        raise InputError(
            f"{path} is no record of selection that this version reads: take the version of siftune that wrote it"
        )
    place = len(_MAGIC)
    while place + _FRAME.size <= len(data):
        kind, length = _FRAME.unpack_from(data, place)
        start, place = place + _FRAME.size, place + _FRAME.size + length
        if place <= len(data):
            yield place, kind, data[start:place]


def _step(kind: bytes, body: bytes) -> int:
    return int(json.loads(body)["step"] if kind == b"L" else _BATCH.unpack_from(body)[0])


def _names(sources: Sequence[str]) -> bytes:
    names = {name: number for number, name in enumerate(dict.fromkeys(sources))}
    if len(names) > _NAMES:  # a name for each row, which tells nothing of kinds of rows
        return b"[]\n"
    numbers = np.fromiter((names[source] for source in sources), np.uint16, len(sources))
    return json.dumps([*names]).encode() + b"\n" + zlib.compress(numbers.astype("<u2").tobytes())


def _parse_names(body: bytes) -> tuple[list[str], NDArray[np.uint16]]:
    names, _, numbers = body.partition(b"\n")
    return [str(name) for name in json.loads(names)], np.frombuffer(
        zlib.decompressobj().decompress(numbers, _MOST), "<u2"
    )


def _batch(choice: SampleChoice, rows: Sequence[int], scores: bool) -> bytes:
    units, samples = choice.scores.shape
    chosen = np.zeros((units, samples), bool)
    for unit, numbers in enumerate(choice.followed()):
        chosen[unit, numbers] = True
    kept = choice.scores.numpy() if scores and not choice.scores.isnan().all() else None
    return b"".join(
        [
            _BATCH.pack(choice.step, choice.batch, units, samples, len(rows), kept is not None),
            np.array(choice.layers, "<i2").tobytes(),
            np.packbits(chosen).tobytes(),
            np.array(rows, "<u4").tobytes(),
            *([] if kept is None else _packed(kept)),
        ]
    )


def _packed(scores_US: NDArray[Any]) -> list[bytes]:
    """A power of two for every unit, and its scores as shares of it: gradients can be too small for float16."""
    sizes_US = np.where(np.isfinite(scores_US), np.abs(scores_US), 0)
    powers_U = np.frexp(sizes_US.max(1))[1].clip(-127, 127).astype(np.int8)
    shares_US = np.ldexp(scores_US, -powers_U[:, None].astype(np.int32)).astype("<f2")
    return [powers_U.tobytes(), shares_US.tobytes()]


def _parse_batch(body: bytes, names: Sequence[str], numbers: NDArray[np.uint16]) -> RowsOfBatch:
    step, batch, units, samples, count, scored = _BATCH.unpack_from(body)
    place = _BATCH.size
    if not (0 < units <= _DEEPEST and samples):
        raise ValueError(f"a batch of {samples} samples and {units} layers")

    def take(kind: str, length: int) -> NDArray[Any]:
        nonlocal place
        values = np.frombuffer(body, kind, length, place)
        place += values.nbytes
        return values

    layers = tuple(take("<i2", units).tolist())
    bits = take("u1", -(-units * samples // 8))
    rows = tuple(take("<u4", count).tolist())
    scores = None
    if scored:
        powers_U = take("i1", units).astype(np.int32)
        scores = np.ldexp(take("<f2", units * samples).astype(np.float32).reshape(units, samples), powers_U[:, None])
    followed = np.unpackbits(bits, count=units * samples).astype(bool).reshape(units, samples)
    sources = tuple(names[numbers[row]] for row in rows) if all(row < len(numbers) for row in rows) else ()
    return RowsOfBatch(step, batch, layers, rows, sources, followed, scores)


def _parse_layers(record: dict[str, Any]) -> LayersOfStep:
    layers = tuple(map(int, record["layers"]))
    importance = None if record.get("importance") is None else np.array(record["importance"], np.float64)
    if not all(0 <= layer < _DEEPEST for layer in layers):
        raise ValueError(f"layers {min(layers)} to {max(layers)}")
    if importance is not None and (importance.ndim != 1 or len(importance) > _DEEPEST):
        raise ValueError(f"importance of shape {importance.shape}")
    return LayersOfStep(int(record["step"]), layers, importance, tuple(map(float, record.get("losses", ()))))


def _of_0_1(path: Path) -> Iterator[LayersOfStep | RowsOfBatch]:
    """Read the lines that 0.1 wrote; one that a crash has cut off is passed over."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        yield _parse_layers(record) if "selected" not in record else _rows_of_0_1(record)


def _rows_of_0_1(record: dict[str, Any]) -> RowsOfBatch:
    scores = None
    if "scores" in record:
        scores = np.array([[np.nan if s is None else s for s in unit] for unit in record["scores"]], np.float32)
    rows = tuple(record.get("rows", ()))
    most = max((number + 1 for unit in record["selected"] for number in unit), default=0)
    samples = scores.shape[1] if scores is not None else max(len(rows), most)
    followed = np.zeros((len(record["layers"]), samples), bool)
    for unit, numbers in enumerate(record["selected"]):
        followed[unit, numbers] = True
    return RowsOfBatch(record["step"], record["batch"], tuple(record["layers"]), rows, (), followed, scores)
