"""`lab/calibration_leak.py` on a tiny model: rows that calibrated are told, others are not."""

import random

import pytest
from support.emulators import base
from support.tokenizer import byte_tokenizer

from lab import calibration_leak
from siftune.data.rows import rows_from
from siftune.offsite.emulator.model import Split


@pytest.fixture(scope="module")
def setting():
    drawn = random.Random(0)
    texts = ["".join(drawn.choices("abcdefgh ", k=12)) for _ in range(200)]
    own, public = (rows_from([{"text": text} for text in part]) for part in (texts[:130], texts[130:]))
    model = base("llama", layers=7, vocab_size=300).float()
    return calibration_leak.Setting(model, byte_tokenizer(), own, public, Split(2, 3), 16, 0)


def test_rows_that_calibrated_are_told_and_others_are_not(setting):
    ways = ["default", "noise-1", "measured"]
    own = {line["way"]: line for line in calibration_leak.measure_set(setting, "own-32", ways)}
    (public,) = calibration_leak.measure_set(setting, "public-32", ["default"])
    assert [*own] == ways
    assert min(own[way]["beside"]["all"][1] for way in ("default", "measured")) > 0.5  # the interval's lower end
    assert public["beside"]["all"][1] < 0.5
    assert own["noise-1"]["lost"]["mlp"] > own["default"]["lost"]["mlp"]
    assert "epsilon" not in own["default"]
    assert float(own["noise-1"]["epsilon_whole"]) > float(own["noise-1"]["epsilon"])
    table = calibration_leak.report([{"set": "own-32", **line} for line in own.values()]).splitlines()
    assert len(table) == 2 + len(ways)
    assert len({line.count("|") for line in table}) == 1


def test_a_set_needs_rows(setting):
    with pytest.raises(SystemExit, match="own-64 needs 192 rows of the owner's, but there are 130"):
        next(calibration_leak.measure_set(setting, "own-64", ["default"]))
