"""Kits, sweeps and audits on a page."""

import json

import pytest
from support.kits import small_kit

from siftune.errors import InputError, KitError
from siftune.report import show
from siftune.report.page.headline import headline
from siftune.report.page.page import sections
from siftune.report.page.subjects import find_subjects

ATTACK = "<script>alert(1)</script>"


def point(**values):
    given = {
        "method": "gradot", "keep": 0.5, "lambda_attn": 0.1, "lambda_mlp": 0.0, "basis": "whitened", "mlp": "refit",
        "cosine": 0.75, "loss": 6.2, "loss_full": 6.0, "parameters": 42464, "kept": 0.5,
        "told": {"value": 0.6, "low": 0.5, "high": 0.7}, "gap": 0.2, "front": True,
    }  # fmt: skip
    return {**given, **values}


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


AUDIT = {
    "conditions": {name: {"nll": estimate(3.0), "accuracy": estimate(0.5)} for name in ("full_zs", "plug_in", "floor")},
    "comparisons": {"nll": {"delta": estimate(0.31)}},
    "membership": {
        "loss": {"auc": estimate(0.62)}, "reference": {"auc": estimate(0.85)}, "blind": {"auc": estimate(0.5)},
        "online": None, "members": 24,
    },
    "calibration": {"attacks": {ATTACK: {"auc": estimate(0.7)}}},
}  # fmt: skip


def save(folder, name, record):
    folder.mkdir()
    (folder / name).write_text(json.dumps(record))
    return folder


def of(folder):
    subjects = find_subjects([str(folder)])
    (section,) = sections(subjects)
    return headline(subjects), section


def test_a_sweep(tmp_path):
    points = [
        point(),
        point(keep=0.3, gap=0.5, cosine=0.4),
        point(method="layerdrop", basis=None, mlp=None, front=False),
    ]
    points.append(point(cosine=None, front=False))
    told, section = of(save(tmp_path / "sweep", "sweep.json", {"points": points}))
    assert told == "4 emulators were compared; 2 of them are not beaten in both likeness and loss gap."
    (figure,) = section.figures
    assert str(figure.draw(700)).count("<circle") == 3
    assert [row[8].text for row in section.tables[0].rows] == ["0.200", "0.500", "0.200", "0.200"]
    assert section.tables[0].rows[3][7].text == "–"


def test_an_audit(tmp_path):
    told, section = of(save(tmp_path / "audit", "audit.json", AUDIT))
    assert told == (
        "Audit: the plugged-in layers do 0.310 nats per token better than the emulator alone; the strongest attack "
        "tells rows apart with an AUC of 0.850 (0.5 is guessing)."
    )
    assert [figure.title for figure in section.figures] == ["Loss of the models", "Accuracy of the models", "Attacks"]
    drawing = str(section.figures[2].draw(500))
    assert drawing.count("<circle") == 4
    assert ATTACK not in drawing


def test_a_data_owner_s_audit_has_attacks_alone(tmp_path):
    told, section = of(save(tmp_path / "audit", "audit.json", {"membership": AUDIT["membership"]}))
    assert "strongest attack" in told
    assert [figure.title for figure in section.figures] == ["Attacks"]


def test_a_kit(tmp_path):
    kit = small_kit(tmp_path / "kit")
    told, section = of(kit.path)
    middle = kit.manifest.middle
    assert told.startswith(f"A kit of a llama with {kit.manifest.depth} layers: 1 and 1 outer layers to tune")
    assert [row[0].text for row in section.tables[0].rows] == [str(shape.base) for shape in middle]
    assert section.tables[0].rows[0][1].text == str(middle[0].channels)
    assert "Ranks" in [figure.title for figure in section.figures]


def test_a_damaged_kit_is_refused(tmp_path):
    kit = small_kit(tmp_path / "kit")
    path = kit.path / "manifest.json"
    path.write_text(path.read_text().replace('"llama"', f'"{ATTACK}"'))
    with pytest.raises(KitError, match="model_type"):
        show(kit.path)


@pytest.mark.parametrize(
    "points", [None, [{}], "x", [point(gap="wide")], [None], [point(told=3)], [point(gap=1e999)], [point(gap=10**400)]]
)
def test_a_damaged_sweep_is_told(tmp_path, points):
    with pytest.raises(InputError, match=r"sweep.json is no sweep .*: run siftune sweep again"):
        show(save(tmp_path / "sweep", "sweep.json", {"points": points}))


@pytest.mark.parametrize(
    "value", [None, 3, "x", [], {"loss": 3}, {"loss": {"auc": {"value": "x"}}}, {"loss": {"auc": {"value": 10**400}}}]
)
def test_an_audit_shows_what_is_there(tmp_path, value):
    record = {"conditions": value, "comparisons": value, "membership": value, "calibration": value}
    assert (
        headline(find_subjects([str(save(tmp_path / "audit", "audit.json", record))])) == "Audit: no figure was found."
    )


@pytest.mark.parametrize(
    ("name", "record"), [("sweep.json", {"points": [point(method=ATTACK)]}), ("audit.json", AUDIT)]
)
def test_what_strangers_wrote_is_escaped(tmp_path, name, record):
    assert ATTACK not in show(save(tmp_path / ATTACK.replace("/", "_"), name, record)).html
