import json
import math
from dataclasses import replace

import numpy as np
import pytest

from siftune.base.errors import RecipeError
from siftune.evaluate.bootstrap import Bootstrap, Estimate
from siftune.offsite.audits.gradients import GradientCosine
from siftune.offsite.audits.members import RowScores
from siftune.offsite.audits.membership import Attack, Membership
from siftune.offsite.audits.models import ParameterShares
from siftune.offsite.audits.result import LABELS, Audit, summarise
from siftune.offsite.audits.settings import AuditSettings
from siftune.offsite.report import audit as page
from siftune.offsite.report.audit import markdown, write_audit

SETTINGS = AuditSettings(resamples=200)
# condition -> nll per token, and right rows of 20
WORTH = {
    "full_zs": (3.0, 8),
    "full_ft": (1.0, 18),
    "emulator_zs": (4.0, 6),
    "emulator_ft": (2.0, 12),
    "plug_in": (1.5, 15),
    "recovered": (1.75, 14),
}


def attack(auc, members=30, others=18):
    """An attack with an AUC, and intervals of a tenth to either side."""
    figures = (Estimate(value, round(value - 0.1, 9), round(value + 0.1, 9)) for value in (auc, 0.1, 0.2))
    return Attack(*figures, members, others)


def made(accuracy="choices", recovery=True, **changes):
    """An audit of twenty rows of two tokens, all alike in their loss."""
    scores = {
        name: RowScores(
            nll=np.full(20, 2 * nll),
            tokens=np.full(20, 2.0),
            correct=np.repeat([1.0, 0.0], [right, 20 - right]) if accuracy else None,
        )
        for name, (nll, right) in WORTH.items()
        if recovery or name != "recovered"
    }
    conditions, comparisons = summarise(scores, Bootstrap(200))
    audit = Audit(
        conditions=conditions,
        comparisons=comparisons,
        accuracy=accuracy,
        cosine=GradientCosine(["first.0", "last.0"], [0.75, math.nan], 0.5, 3.0, 4.0),
        shares=ParameterShares(0.7, 0.8),
        membership=Membership(attack(0.6), attack(0.65), attack(0.52), 30, 18, 2),
        settings=SETTINGS,
        facts={"train_rows": 40, "tuned_rows": 30, "held_out_rows": 20, "returned": False, "model": "smollm2"},
    )
    return replace(audit, **changes)


def test_summaries_by_hand():
    audit = made()
    nll, accuracy = audit.comparisons["nll"], audit.comparisons["accuracy"]
    assert nll.delta == Estimate(0.5, 0.5, 0.5)  # in nats that the plug-in is better by
    assert nll.gain_share == Estimate(0.75, 0.75, 0.75)
    assert nll.recovery == Estimate(0.75, 0.75, 0.75)
    assert accuracy.delta.value == pytest.approx(0.15)
    assert accuracy.delta.low < 0.15 < accuracy.delta.high
    assert accuracy.gain_share.value == pytest.approx(0.7)
    assert accuracy.recovery.value == pytest.approx(8 / 12)
    one = audit.conditions["plug_in"]
    assert (one.nll, one.accuracy.value) == (Estimate(1.5, 1.5, 1.5), 0.75)
    assert made(recovery=False).comparisons["nll"].recovery is None
    assert "accuracy" not in made(accuracy=None).comparisons


def test_the_sign_of_an_interval_of_the_loss():
    rng = np.random.default_rng(0)
    scores = {name: RowScores(rng.uniform(1, 9, 20), np.full(20, 2.0)) for name in LABELS}
    conditions, _ = summarise(scores, Bootstrap(200))
    for name, one in conditions.items():
        assert one.nll.value == pytest.approx(scores[name].nll.sum() / 40)
        assert 0 < one.nll.low < one.nll.value < one.nll.high


def test_json_is_plain_and_strict(tmp_path):
    audit = made()
    write_audit(audit, tmp_path / "a" / "b")

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "a" / "b" / "audit.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=refuse)
    assert found == audit.to_dict(rows=True)
    assert found["cosine"]["per_layer"] == [0.75, None]
    assert found["conditions"]["plug_in"]["rows"]["correct"] == [1.0] * 15 + [0.0] * 5
    assert found["conditions"]["plug_in"]["nll"] == {"value": 1.5, "low": 1.5, "high": 1.5}
    assert found["comparisons"]["nll"]["gain_share"]["value"] == 0.75
    assert found["membership"]["members"] == 30
    assert found["settings"]["steps"] == 100
    assert found["facts"]["model"] == "smollm2"
    short = audit.to_dict()
    assert "rows" not in short["conditions"]["plug_in"]
    json.dumps(short, allow_nan=False)


def table(text, first):
    """The cells of the line whose first cell it is."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_markdown():
    text = markdown(made())
    assert table(text, "Plug-in") == ["1.500 [1.500, 1.500]", "75.0 % [53.1, 88.8]"]
    assert table(text, "Δ")[1] == "+0.500 [+0.500, +0.500]"
    assert table(text, "Δ")[0].startswith("+15.0 points [+")
    assert table(text, "gain share")[1] == "0.750 [0.750, 0.750]"
    assert table(text, "recovery")[1] == "0.750 [0.750, 0.750]"
    assert table(text, "first.0") == ["0.750"]
    assert table(text, "last.0") == ["not defined"]
    assert table(text, "all") == ["0.500"]
    assert table(text, "kept of the middle's parameters") == ["0.700"]
    assert table(text, "by loss") == [
        "0.600 [0.500, 0.700]", "10.0 % [0.0, 20.0] (too few others)", "20.0 % [10.0, 30.0] (too few others)"
    ]  # fmt: skip
    assert table(text, "by loss against the base's")[0] == "0.650 [0.550, 0.750]"
    assert table(text, "blind: the base's loss alone")[0] == "0.520 [0.420, 0.620]"
    assert "Rows: 30 members, 18 others, 2 left out as both; no shadow models were tuned (--shadows N)." in text
    assert "Training rows can be distinguished from others: by loss against the base's" in text
    assert "18 others are too few to resolve 1 % and 5 % false alarms" in text
    assert "differ by source" not in text
    assert "base `smollm2`, 30 rows to tune on, 20 held-out rows; 100 steps of 16 rows" in text
    assert "all outer layers tuned here" in text
    assert "it proves no privacy" in text


def test_markdown_of_less():
    text = markdown(made(accuracy=None, recovery=False, membership=None))
    assert table(text, "Plug-in") == ["1.500 [1.500, 1.500]"]
    assert "| recovery |" not in text
    assert "| Recovered |" not in text
    assert "Leakage of training rows" not in text
    assert "calibration rows" not in text
    assert "secrets" not in text
    facts = {**made().facts, "returned": True}
    assert "the emulator's outer layers are a return" in markdown(made(facts=facts))


def test_figures_without_value_or_interval():
    audit = made()
    for estimate, words in ((Estimate(), "not defined"), (Estimate(2.0), "2.000 [no interval]")):
        comparisons = {name: replace(one, gain_share=estimate) for name, one in audit.comparisons.items()}
        assert table(markdown(replace(audit, comparisons=comparisons)), "gain share") == [words, words]


def test_a_failed_write_leaves_the_old_audit(tmp_path, monkeypatch):
    write_audit(made(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"audit.json", "audit.md"}
    write = page.Path.write_bytes

    def full(self, data):
        if self.name == ".audit.md.partial":
            write(self, data[:10])
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(page.Path, "write_bytes", full)
    other = made(shares=ParameterShares(0.1, 0.2))
    with pytest.raises(RecipeError, match=r"cannot be written to \(No space left on device\)"):
        write_audit(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(page.Path, "write_bytes", write)
    write_audit(other, tmp_path)
    assert json.loads((tmp_path / "audit.json").read_text())["shares"]["middle"] == 0.1


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"the folder .*file cannot be written to"):
        write_audit(made(), tmp_path / "file")
