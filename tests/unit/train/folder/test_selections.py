"""The selection record: the same choices when read again, continued from a checkpoint, checked when untrusted."""

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import InputError
from siftune.methods.drivers.layer_driver import LayerChoice
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.train.folder import selections
from siftune.train.folder.run_folder import SELECTIONS
from siftune.train.folder.selections import SelectionRecord, read_selections

SOURCES = ("web", "books", "web", "code")


def choice(step=0, units=3, samples=4, scores=None, followed=None, layers=None):
    """A choice in a batch, of the same number of rows for every layer."""
    generator = np.random.default_rng(step)
    followed = draw(generator, units, samples, max(1, samples // 2)) if followed is None else followed
    scores = generator.normal(size=(units, samples)) if scores is None else scores
    numbers = [np.flatnonzero(row).tolist() for row in followed]
    layers = tuple(range(units)) if layers is None else layers
    return SampleChoice(step, 1, tuple("abcde"[:units]), layers, torch.tensor(scores), torch.tensor(numbers))


def draw(generator, units, samples, count):
    """Rows that each layer follows, (U, S), as many for every layer."""
    return generator.random((units, samples)).argsort(1).argsort(1) < count


def add(record, *choices):
    for one in choices:
        if isinstance(one, LayerChoice):
            record.layers(one)
        else:
            record.rows(one, range(one.scores.shape[1]))


def write(folder, *choices, sources=SOURCES):
    folder.mkdir(exist_ok=True)
    record = SelectionRecord(folder, sources)
    add(record, *choices)
    record.write()


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6), st.floats(-37, 37))
def test_rows_read_back_as_they_were(tmp_path_factory, units, samples, seed, power):
    generator = np.random.default_rng(seed)
    scores = (generator.normal(size=(units, samples)) * 10.0**power).astype(np.float32)
    scores[generator.random(scores.shape) < 0.1] = generator.choice([np.nan, np.inf, 0.0])
    followed = draw(generator, units, samples, int(generator.integers(1, samples + 1)))
    folder = tmp_path_factory.mktemp("run")
    write(folder, choice(7, units, samples, scores, followed), sources=["web"] * samples)
    (read,) = read_selections(folder)
    assert (read.step, read.batch, read.layers) == (7, 1, tuple(range(units)))
    assert read.rows == tuple(range(samples))
    assert read.sources == ("web",) * samples
    np.testing.assert_array_equal(read.followed, followed)
    if np.isnan(scores).all():
        assert read.scores is None
    else:
        np.testing.assert_array_equal(read.scores, scores)


def test_layers_read_back_as_they_were(tmp_path):
    importance = torch.randn(5, dtype=torch.float64)
    moved = LayerChoice(1, (0, 4), importance, True, (1.5, 2.5), (0.1, -0.1), ((1,), (2,)))
    write(tmp_path, LayerChoice(0, (2,), importance), moved, choice(1))
    first, second, rows = read_selections(tmp_path)
    assert (first.step, first.layers, first.importance, first.losses) == (0, (2,), None, ())
    assert (second.step, second.layers, second.losses) == (1, (0, 4), (1.5, 2.5))
    np.testing.assert_array_equal(second.importance, importance.numpy())
    assert rows.sources == SOURCES


def test_scores_are_optional(tmp_path):
    write(tmp_path, choice(scores=np.full((3, 4), np.nan)))
    assert [read.scores for read in read_selections(tmp_path)] == [None]


@pytest.mark.parametrize("sources", [[str(number) for number in range(2**16 + 1)], ["web"]])
def test_sources_are_left_out_if_they_name_single_rows_or_not_all_rows(tmp_path, sources):
    write(tmp_path, choice(), sources=sources)
    (read,) = read_selections(tmp_path)
    assert read.sources == ()


def test_a_batch_of_16_rows_and_30_layers_takes_2500_bytes(tmp_path):
    sizes = []
    for count in (10, 20):
        batches = [choice(step, 30, 16, layers=tuple(range(30))) for step in range(count)]
        write(tmp_path, *batches, sources=["web"] * 16)
        sizes.append((tmp_path / SELECTIONS).stat().st_size)
    assert (sizes[1] - sizes[0]) / 10 <= 2500


def test_a_run_without_choices_leaves_no_file(tmp_path):
    write(tmp_path, choice())
    write(tmp_path)
    assert not (tmp_path / SELECTIONS).exists()
    assert list(read_selections(tmp_path)) == []


def test_the_record_continues_from_the_checkpoint(tmp_path, monkeypatch):
    args, state = TrainingArguments(str(tmp_path), report_to=[]), TrainerState(global_step=2)
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    first = SelectionRecord(tmp_path, SOURCES)
    add(first, choice(0), choice(1))
    first.on_save(args, state, TrainerControl())
    add(first, choice(2))
    first.leave()
    assert [read.step for read in read_selections(tmp_path)] == [0, 1, 2]
    monkeypatch.setattr(selections, "resumed_from", lambda callback: checkpoint)
    second = SelectionRecord(tmp_path, ("new",) * 4)
    second.on_train_begin(args, state, TrainerControl())
    assert [read.step for read in read_selections(tmp_path)] == [0, 1]
    add(second, choice(2))
    second.on_train_end(args, state, TrainerControl())
    assert [(read.step, read.sources[1]) for read in read_selections(tmp_path)] == [
        (0, "books"),
        (1, "books"),
        (2, "new"),
    ]


LINE = {
    "step": 0, "batch": 0, "layers": [0, 1], "importance": [], "losses": [], "rows": [5, 6], "sources": ["a", "b"],
    "followed": [True, False, False, True], "scores": [0.0, 1.0, 2.0, 3.0],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [7000]}, {"layers": [-2]}, {"layers": []}, {"layers": None}, {"layers": [0, None]},
        {"layers": [0] * 2000, "followed": [True] * 2000}, {"batch": None, "layers": [-1]},
        {"batch": None, "importance": [0.0] * 2000}, {"step": None}, {"followed": [True] * 3}, {"followed": []},
        {"scores": [0.0]}, {"rows": [1]}, {"sources": ["a"]},
    ],
)  # fmt: skip
def test_choices_that_no_run_makes_are_refused(tmp_path, change):
    schema = selections._schema()
    parquet.write_table(pyarrow.Table.from_pylist([LINE], schema), tmp_path / SELECTIONS)
    assert len(list(read_selections(tmp_path))) == 1
    parquet.write_table(pyarrow.Table.from_pylist([LINE | change], schema), tmp_path / SELECTIONS)
    with pytest.raises(InputError, match=SELECTIONS):
        list(read_selections(tmp_path))
