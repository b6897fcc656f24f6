"""The record of what was chosen: small, whole after a crash, and the same when read again."""

import json
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.base.errors import InputError
from siftune.methods.drivers.layer_driver import LayerChoice
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.train.folder.selections import SELECTION, SelectionFile, _parse_names, cut_selection, read_selection


def choice(step=0, units=3, samples=4, scores=None, followed=None, layers=None):
    """A choice in a batch; -1 stands behind the numbers where a unit follows fewer samples than others."""
    generator = np.random.default_rng(step)
    followed = generator.random((units, samples)) < 0.5 if followed is None else followed
    scores = generator.normal(size=(units, samples)) if scores is None else scores
    most = max(1, int(followed.sum(1).max()))
    numbers = [[*np.flatnonzero(row).tolist(), *[-1] * most][:most] for row in followed]
    layers = tuple(range(units)) if layers is None else layers
    return SampleChoice(step, 1, tuple("abc"[:units]), layers, torch.tensor(scores), torch.tensor(numbers))


def write(folder, choices, scores=True, sources=("web", "books", "web", "code")):
    folder.mkdir(exist_ok=True)
    record = SelectionFile(folder, sources, scores)
    for one in choices:
        if isinstance(one, LayerChoice):
            record.layers(one)
        else:
            record.rows(one, range(one.scores.shape[1]))
    return folder / SELECTION


def steps(folder):
    return [record.step for record in read_selection(folder)]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6), st.floats(-37, 37))
def test_choices_read_back_as_they_were(tmp_path_factory, units, samples, seed, power):
    generator = np.random.default_rng(seed)
    scores = (generator.normal(size=(units, samples)) * 10.0**power).astype(np.float32)
    scores[generator.random(scores.shape) < 0.1] = generator.choice([np.nan, np.inf, 0.0])
    followed = generator.random((units, samples)) < generator.random()
    folder = tmp_path_factory.mktemp("run")
    write(folder, [choice(7, units, samples, scores, followed)], sources=["web"] * samples)
    (read,) = read_selection(folder)
    assert (read.step, read.batch, read.layers) == (7, 1, tuple(range(units)))
    assert read.rows == tuple(range(samples))
    assert read.sources == ("web",) * samples
    np.testing.assert_array_equal(read.followed, followed)
    if np.isnan(scores).all():
        assert read.scores is None
        return
    np.testing.assert_array_equal(np.isfinite(read.scores), np.isfinite(scores))
    finite = np.where(np.isfinite(scores), scores, 0).astype(np.float64)
    largest = np.abs(finite).max(1, keepdims=True)
    error = np.abs(np.where(np.isfinite(read.scores), read.scores, 0) - finite)
    assert (error <= np.maximum(2.0**-11 * np.abs(finite), 2.0**-24 * largest) + 2.0**-149).all()


def test_a_batch_of_16_rows_and_30_layers_takes_1200_bytes(tmp_path):
    scores = np.random.default_rng(0).normal(size=(30, 16))
    followed = scores > 0
    batch = SampleChoice(
        3, 0, ("l",) * 30, tuple(range(30)), torch.tensor(scores),
        torch.tensor([[*np.flatnonzero(row).tolist(), *[-1] * 16][:16] for row in followed]),
    )  # fmt: skip
    record = SelectionFile(tmp_path, ["web"] * 64, scores=True)
    record.rows(batch, range(16))
    before = (tmp_path / SELECTION).stat().st_size
    record.rows(batch, range(16))
    assert (tmp_path / SELECTION).stat().st_size - before <= 1200


def test_scores_are_left_out_where_they_are_not_wanted_or_not_there(tmp_path):
    write(tmp_path / "a", [choice()], scores=False)
    write(tmp_path / "b", [choice(scores=np.full((3, 4), np.nan))])
    for name in "ab":
        (read,) = read_selection(tmp_path / name)
        assert read.scores is None


def test_layers_read_back_as_they_were(tmp_path):
    importance = torch.randn(5, dtype=torch.float64)
    moved = LayerChoice(1, (0, 4), importance, True, (1.5, 2.5), (0.1, -0.1), ((1,), (2,)))
    write(tmp_path, [LayerChoice(0, (2,), importance), moved])
    first, second = read_selection(tmp_path)
    assert (first.step, first.layers, first.importance, first.losses) == (0, (2,), None, ())
    assert (second.step, second.layers, second.losses) == (1, (0, 4), (1.5, 2.5))
    np.testing.assert_array_equal(second.importance, importance.numpy())


def test_where_rows_are_from_is_that_of_the_process_that_wrote_them(tmp_path):
    write(tmp_path, [choice(0)], sources=("a", "b", "a", "b"))
    write(tmp_path, [choice(1)], sources=("c", "c", "c", "d"))
    write(tmp_path, [choice(2)], sources=("c",))  # batches have rows that it does not know
    assert [read.sources for read in read_selection(tmp_path)] == [("a", "b", "a", "b"), ("c", "c", "c", "d"), ()]


def test_a_name_for_every_row_is_no_source(tmp_path):
    write(tmp_path, [choice(0)], sources=[str(number) for number in range(2**16 + 1)])
    (read,) = read_selection(tmp_path)
    assert read.sources == ()


def test_any_place_to_break_off_leaves_what_was_whole(tmp_path):
    data = write(tmp_path / "whole", [choice(0), LayerChoice(1, (0,)), choice(2)]).read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    counts = []
    for length in range(len(data) + 1):
        (cut / SELECTION).write_bytes(data[:length])
        counts.append(len(steps(cut)))
        cut_selection(cut, 2)  # as a resumed run does, which then writes that step again
        write(cut, [choice(2)])
        assert steps(cut) == [0, 1, 2][: counts[-1]] + ([2] if counts[-1] < 3 else [])
    assert counts == sorted(counts)
    assert {*counts} == {0, 1, 2, 3}


@pytest.mark.parametrize("step", range(4))
def test_records_are_cut_behind_a_step(tmp_path, step):
    write(tmp_path, [LayerChoice(0, (1,)), choice(0), LayerChoice(1, (0,)), choice(1), choice(1), choice(2)])
    cut_selection(tmp_path, step)
    assert steps(tmp_path) == [0, 0, 1, 1, 1, 2][: (0, 2, 5, 6)[step]]
    cut_selection(tmp_path / "no folder", step)


def test_the_records_of_0_1_are_read(tmp_path):
    lines = [
        {"step": 0, "layers": [1, 3], "importance": [0.5, -0.5]},
        {"step": 0, "batch": 0, "layers": [0, 1], "selected": [[0], [1, 2]], "rows": [5, 6, 7]},
        {"step": 1, "batch": 0, "layers": [-1], "selected": [[1]], "scores": [[None, 2.0]]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "selection.jsonl").write_text(text + '{"step": 2, "lay')
    layers, rows, scored = read_selection(tmp_path)
    assert layers.layers == (1, 3)
    assert layers.importance.tolist() == [0.5, -0.5]
    assert rows.followed.tolist() == [[True, False, False], [False, True, True]]
    assert (rows.rows, rows.sources, rows.scores) == ((5, 6, 7), (), None)
    assert math.isnan(scored.scores[0, 0])
    assert scored.followed.tolist() == [[False, True]]


def frame(kind, body):
    return struct.pack("<cI", kind, len(body)) + body


BATCH = struct.pack("<IHHHHB", 0, 0, 2, 2, 2, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"siftsel2", "is no record of selection that this version reads"),
        (b"PK\x03\x04 and so on", "is no record of selection that this version reads"),
        (b"siftsel1" + frame(b"L", b"{"), "is damaged"),
        (b"siftsel1" + frame(b"L", b"[]"), "is damaged"),
        (b"siftsel1" + frame(b"L", b'{"step": 1e999, "layers": []}'), "is damaged"),
        (b"siftsel1" + frame(b"S", b"12"), "is damaged"),
        (b"siftsel1" + frame(b"S", BATCH), "is damaged"),
        (b"siftsel1" + frame(b"N", b'["a"]\nnot deflated'), "is damaged"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, data, message):
    (tmp_path / SELECTION).write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(read_selection(tmp_path))


def test_frames_of_later_versions_are_passed_over(tmp_path):
    write(tmp_path, [choice(0)])
    with (tmp_path / SELECTION).open("ab") as file:
        file.write(frame(b"Z", b"whatever"))
    write(tmp_path, [choice(1)])
    assert steps(tmp_path) == [0, 1]


def test_a_stranger_s_record_does_not_unfold_to_any_size(monkeypatch):
    monkeypatch.setattr("siftune.train.folder.selections._MOST", 1000)
    names, numbers = _parse_names(b'["a"]\n' + zlib.compress(bytes(10**7)))
    assert names == ["a"]
    assert numbers.nbytes == 1000
