"""The selections of a run: RUN/selections.parquet, and a copy in each checkpoint.

One line for each choice, in the order of training: of layers for a step, or of rows for a batch.

    step        int32           optimizer steps done before it
    batch       int32           number of the batch in the step; null for a choice of layers
    layers      list<int16>     layers that train; for rows the (U,) layers that choose, -1 for one choice for all
    importance  list<float64>   (L,) importance logits, if the step changed them
    losses      list<float64>   losses of the candidate sets, if the step compared them
    rows        list<int32>     (S,) numbers of the batch's rows among the training rows
    sources     list<string>    (S,) the sources of these rows, if they are recorded
    followed    list<bool>      (U·S,) whether a layer follows a row, layer by layer
    scores      list<float32>   (U·S,) scores of the rows, layer by layer; NaN for a row without a score

A list that does not apply is empty. Read it with pandas, polars, DuckDB or `read_selections`. The file is written with
each checkpoint and at the end of the run. A resumed run continues the copy in its checkpoint.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import InputError
from siftune.base.parquet_files import read_table, write_table
from siftune.base.text import one_line
from siftune.methods.drivers.layer_driver import LayerChoice
from siftune.methods.drivers.sample_choice import ALL_LAYERS, SampleChoice
from siftune.methods.host.callback import resumed_from
from siftune.train.folder.run_folder import SELECTIONS

if TYPE_CHECKING:
    import pyarrow


_MOST_SOURCES = 2**16  # more names than this name single rows, not kinds of rows
_MOST_LAYERS = 2**10  # an untrusted file could name any layer
_AGAIN = "move it elsewhere"


@dataclass(frozen=True)
class LayersOfStep:
    """The layers that train in a step."""

    step: int  # optimizer steps done before it
    layers: tuple[int, ...]
    importance: NDArray[np.float64] | None = None  # (L,) logits, if the step changed them
    losses: tuple[float, ...] = ()  # losses of the candidate sets, if they were compared before this step


@dataclass(frozen=True, eq=False)
class RowsOfBatch:
    """The rows that each layer follows in a batch."""

    step: int  # optimizer steps done before it
    batch: int  # its number in the step
    layers: tuple[int, ...]  # (U,) numbers of the layers; -1 for one choice for all layers
    rows: tuple[int, ...]  # (S,) numbers of its rows among the training rows; empty if they are not numbered
    sources: tuple[str, ...]  # (S,) sources of these rows; empty if they are not recorded
    followed: NDArray[np.bool_]  # (U, S) whether a layer follows a row
    scores: NDArray[np.float32] | None  # (U, S); None if the choice needed none


class SelectionRecord(TrainerCallback):  # type: ignore[misc]
    """Records each choice of layers and rows, and writes the file with each checkpoint, on the first rank.

    Args:
        folder: The run folder.
        sources: The source of each training row, by its number.
    """

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        self._path = folder / SELECTIONS
        names = {name: name.encode(errors="replace").decode() for name in set(sources)}  # half a surrogate pair
        self._sources = [names[name] for name in sources] if len(names) <= _MOST_SOURCES else []
        self._tables: list[pyarrow.Table] = []  # choices in their final form
        self._lines: list[dict[str, Any]] = []  # choices since then

    def layers(self, choice: LayerChoice) -> None:
        """Add a choice of layers."""
        importance = choice.importance if choice.moved else None
        self._lines.append(
            {
                "step": choice.step,
                "layers": choice.layers,
                "importance": () if importance is None else importance.double().tolist(),
                "losses": choice.losses,
            }
        )

    def rows(self, choice: SampleChoice, rows: Sequence[int]) -> None:
        """Add the choice in a batch; `rows` are the numbers of its rows among the training rows."""
        followed_US = np.zeros(choice.scores.shape, bool)
        for unit, numbers in enumerate(choice.selected.tolist()):
            followed_US[unit, numbers] = True
        with_scores = not choice.scores.isnan().all()
        has_sources = bool(rows) and max(rows) < len(self._sources)
        self._lines.append(
            {
                "step": choice.step,
                "batch": choice.batch,
                "layers": choice.layers,
                "rows": rows,
                "sources": [self._sources[row] for row in rows] if has_sources else (),
                "followed": followed_US.ravel(),
                "scores": choice.scores.float().numpy().ravel() if with_scores else (),
            }
        )

    def write(self, *places: Path) -> None:
        """Write the file, and copies; without a choice none is written, and an old one is removed."""
        import pyarrow

        if self._lines:
            schema = _schema()
            columns = {name: [line.get(name, _DEFAULTS.get(name)) for line in self._lines] for name in schema.names}
            self._tables.append(pyarrow.table(columns, schema=schema))
            self._lines = []
        if not self._tables:
            self._path.unlink(missing_ok=True)
            return
        self._tables = [pyarrow.concat_tables(self._tables)]
        for path in (self._path, *places):
            write_table(
                path,
                self._tables[0],
                use_dictionary=["rows.list.element", "sources.list.element"],
                column_encoding={"scores.list.element": "BYTE_STREAM_SPLIT"},  # a fifth smaller
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the record in the checkpoint, or begin a new one."""
        checkpoint = resumed_from(self) if state.global_step else None
        before = None if checkpoint is None else checkpoint / SELECTIONS
        self._lines, self._tables = [], [_read(before)] if before is not None and before.is_file() else []
        self.write()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the file, and a copy into the checkpoint."""
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        self.write(*([checkpoint / SELECTIONS] if checkpoint.is_dir() else []))

    def leave(self) -> None:
        """Write what is not written yet, after training ended in an exception."""
        if self._lines:
            self.write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the file."""
        self.write()


def read_selections(folder: Path) -> Iterator[LayersOfStep | RowsOfBatch]:
    """Read the choices of a run in the order of training; none if the run has no record.

    Raises:
        InputError: The record is damaged, or another kind of file.
    """
    path = folder / SELECTIONS
    if not path.exists():
        return
    table = _read(path)
    steps, batches = (table[name].to_pylist() for name in ("step", "batch"))
    lists = {name: _lists(table, name) for name in table.column_names[2:]}
    try:
        for number, (step, batch) in enumerate(zip(steps, batches, strict=True)):
            line = {name: values[number] for name, values in lists.items()}
            yield _layers(step, line) if batch is None else _rows(step, batch, line)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({one_line(str(error))}); {_AGAIN}") from error


def _layers(step: int, line: dict[str, Any]) -> LayersOfStep:
    layers = _checked(line["layers"], least=0)
    importance = line["importance"].astype(np.float64)
    if len(importance) > _MOST_LAYERS:
        raise ValueError(f"importance of {len(importance)} layers")
    losses = tuple(line["losses"].astype(np.float64).tolist())
    return LayersOfStep(int(step), layers, importance if len(importance) else None, losses)


def _rows(step: int, batch: int, line: dict[str, Any]) -> RowsOfBatch:
    layers, followed, scores = _checked(line["layers"], least=ALL_LAYERS), line["followed"], line["scores"]
    samples, rest = divmod(len(followed), max(1, len(layers)))
    lengths = (len(line["rows"]), len(line["sources"]))
    if not samples or rest or len(scores) not in (0, len(followed)) or not {*lengths} <= {0, samples}:
        raise ValueError(f"a batch of {samples} rows and {len(layers)} layers")
    shape = len(layers), samples
    return RowsOfBatch(
        int(step),
        int(batch),
        layers,
        tuple(line["rows"].astype(np.int64).tolist()),
        tuple(line["sources"].tolist()),
        followed.astype(bool).reshape(shape),
        scores.astype(np.float32).reshape(shape) if len(scores) else None,
    )


def _checked(layers: NDArray[Any], least: int) -> tuple[int, ...]:
    numbers = tuple(layers.astype(np.int64).tolist())
    if not all(least <= number < _MOST_LAYERS for number in numbers) or len(numbers) > _MOST_LAYERS:
        raise ValueError(f"layers {min(numbers)} to {max(numbers)}")
    return numbers


def _schema() -> "pyarrow.Schema":
    import pyarrow

    lists = {
        "layers": pyarrow.int16(), "importance": pyarrow.float64(), "losses": pyarrow.float64(),
        "rows": pyarrow.int32(), "sources": pyarrow.string(), "followed": pyarrow.bool_(), "scores": pyarrow.float32(),
    }  # fmt: skip
    fields = {"step": pyarrow.int32(), "batch": pyarrow.int32()}
    return pyarrow.schema(fields | {name: pyarrow.list_(kind) for name, kind in lists.items()})


_DEFAULTS: dict[str, tuple[()]] = dict.fromkeys(("importance", "losses", "rows", "sources", "followed", "scores"), ())


def _read(path: Path) -> "pyarrow.Table":
    schema = _schema()
    return read_table(path, dict(zip(schema.names, schema.types, strict=True)), _AGAIN, nullable=schema.names)


def _lists(table: "pyarrow.Table", name: str) -> list[NDArray[Any]]:
    """The lists of a column, an array for each line."""
    column = table[name].combine_chunks()
    values, ends = (
        column.flatten().to_numpy(zero_copy_only=False),
        column.value_lengths().fill_null(0).to_numpy().cumsum(),
    )
    return np.split(values, ends[:-1]) if len(ends) else []
