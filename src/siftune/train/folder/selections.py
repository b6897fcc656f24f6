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

A list that does not apply is empty. Read it with pandas, polars or DuckDB. The file is written with each checkpoint and
at the end of the run. A resumed run continues the copy in its checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.parquet_files import read_table, write_table
from siftune.methods.drivers.layer_driver import LayerChoice
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.methods.host.callback import resumed_from
from siftune.train.folder.run_folder import SELECTIONS

if TYPE_CHECKING:
    import pyarrow


_MOST_SOURCES = 2**16  # more names than this name single rows, not kinds of rows
_AGAIN = "move it elsewhere"


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
        self._lines, self._tables = [], [read_selections(before)] if before is not None and before.is_file() else []
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


def _schema() -> "pyarrow.Schema":
    import pyarrow

    lists = {
        "layers": pyarrow.int16(), "importance": pyarrow.float64(), "losses": pyarrow.float64(),
        "rows": pyarrow.int32(), "sources": pyarrow.string(), "followed": pyarrow.bool_(), "scores": pyarrow.float32(),
    }  # fmt: skip
    fields = {"step": pyarrow.int32(), "batch": pyarrow.int32()}
    return pyarrow.schema(fields | {name: pyarrow.list_(kind) for name, kind in lists.items()})


_DEFAULTS: dict[str, tuple[()]] = dict.fromkeys(("importance", "losses", "rows", "sources", "followed", "scores"), ())


def read_selections(path: Path) -> "pyarrow.Table":
    """Read a record, a row for each choice.

    Raises:
        InputError: It is damaged, or another kind of file.
    """
    schema = _schema()
    return read_table(path, dict(zip(schema.names, schema.types, strict=True)), _AGAIN, nullable=schema.names)
