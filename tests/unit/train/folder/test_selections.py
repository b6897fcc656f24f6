"""The selection record: the same choices when read again, continued from a checkpoint, refused if damaged."""

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


def lines_of(folder):
    return read_selections(folder / SELECTIONS).to_pylist()


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
    (line,) = lines_of(folder)
    assert (line["step"], line["batch"], line["layers"]) == (7, 1, [*range(units)])
    assert line["rows"] == [*range(samples)]
    assert line["sources"] == ["web"] * samples
    assert line["followed"] == followed.ravel().tolist()
    if np.isnan(scores).all():
        assert line["scores"] == []
    else:
        np.testing.assert_array_equal(line["scores"], scores.ravel())


def test_layers_read_back_as_they_were(tmp_path):
    importance = torch.randn(5, dtype=torch.float64)
    moved = LayerChoice(1, (0, 4), importance, True, (1.5, 2.5), (0.1, -0.1), ((1,), (2,)))
    write(tmp_path, LayerChoice(0, (2,), importance), moved, choice(1))
    first, second, rows = lines_of(tmp_path)
    layers = ("step", "batch", "layers", "importance", "losses")
    assert [first[name] for name in layers] == [0, None, [2], [], []]
    assert [second[name] for name in layers] == [1, None, [0, 4], importance.tolist(), [1.5, 2.5]]
    assert rows["sources"] == [*SOURCES]


def test_scores_are_optional(tmp_path):
    write(tmp_path, choice(scores=np.full((3, 4), np.nan)))
    assert [line["scores"] for line in lines_of(tmp_path)] == [[]]


@pytest.mark.parametrize("sources", [[str(number) for number in range(2**16 + 1)], ["web"]])
def test_sources_are_left_out_if_they_name_single_rows_or_not_all_rows(tmp_path, sources):
    write(tmp_path, choice(), sources=sources)
    (line,) = lines_of(tmp_path)
    assert line["sources"] == []


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


def test_the_record_continues_from_the_checkpoint(tmp_path, monkeypatch):
    args, state = TrainingArguments(str(tmp_path), report_to=[]), TrainerState(global_step=2)
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    first = SelectionRecord(tmp_path, SOURCES)
    add(first, choice(0), choice(1))
    first.on_save(args, state, TrainerControl())
    add(first, choice(2))
    first.leave()
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2]
    monkeypatch.setattr(selections, "resumed_from", lambda callback: checkpoint)
    second = SelectionRecord(tmp_path, ("new",) * 4)
    second.on_train_begin(args, state, TrainerControl())
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1]
    add(second, choice(2))
    second.on_train_end(args, state, TrainerControl())
    assert [(line["step"], line["sources"][1]) for line in lines_of(tmp_path)] == [
        (0, "books"),
        (1, "books"),
        (2, "new"),
    ]


@pytest.mark.parametrize("part", [0.0, 0.5, 0.9])
def test_a_damaged_file_is_refused(tmp_path, part):
    write(tmp_path, choice())
    data = (tmp_path / SELECTIONS).read_bytes()
    (tmp_path / SELECTIONS).write_bytes(data[: int(part * len(data))])
    with pytest.raises(InputError, match=SELECTIONS):
        read_selections(tmp_path / SELECTIONS)


def test_another_table_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"step": [1]}), tmp_path / SELECTIONS)
    with pytest.raises(InputError, match=SELECTIONS):
        read_selections(tmp_path / SELECTIONS)
