"""Kits, sweeps and audits on a page."""

import json

import pytest
from support.kits import small_kit

from siftune.base.errors import InputError, KitError
from siftune.report import show
from siftune.report.compare import headline
from siftune.report.page import sections
from siftune.report.subjects import find_subjects

ATTACK = "<script>alert(1)</script>"


def point(**values):
    given = {
        "method": "gradot", "keep": 0.5, "lambda_attn": 0.1, "lambda_mlp": 0.0, "basis": "whitened", "mlp": "refit",
        "cosine": 0.75, "loss": 6.2, "loss_full": 6.0, "parameters": 42464, "middle_share": 0.5,
        "calibration_auc": {"value": 0.6, "low": 0.5, "high": 0.7}, "gap": 0.2, "front": True,
    }  # fmt: skip
    given["loss"] = 6.0 + values.get("gap", 0.2)
    return {**given, **values}


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


AUDIT = {
    "conditions": {
        name: {"nll": estimate(3.0), "accuracy": estimate(0.5)} for name in ("full_zs", "emulator_zs", "plug_in")
    },
    "comparisons": {"nll": {"delta": estimate(0.31)}},
    "cosine": {"layers": ["first.0", "last.0"], "per_layer": [0.75, None], "overall": 0.5},
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
    assert told == "Of 4 emulators, 2 are on the Pareto front of cosine and loss gap."
    (figure,) = section.figures
    assert str(figure.draw(700)).count("<circle") == 3
    cells = [[row[column].text for column in (8, 10, 12)] for row in section.tables[0].rows]
    assert cells == [
        ["0.750", "+0.200", "*"],
        ["0.750", "+0.200", "*"],
        ["–", "+0.200", ""],
        ["0.400", "+0.500", "*"],
    ]


def test_an_audit(tmp_path):
    told, section = of(save(tmp_path / "audit", "audit.json", AUDIT))
    assert told == (
        "Audit: the plugged-in layers do 0.310 nats per token better than the emulator alone; the strongest attack "
        "has an AUC of 0.850 (0.5 is guessing)."
    )
    assert [figure.title for figure in section.figures] == [
        "Loss of the models", "Accuracy of the models", "Cosine of gradients", "Attacks"
    ]  # fmt: skip
    assert str(section.figures[2].draw(500)).count("<circle") == 2
    drawing = str(section.figures[3].draw(500))
    assert drawing.count("<circle") == 4
    assert ATTACK not in drawing


def test_a_data_owner_s_audit_has_attacks_alone(tmp_path):
    told, section = of(save(tmp_path / "audit", "audit.json", {"membership": AUDIT["membership"]}))
    assert "strongest attack" in told
    assert [figure.title for figure in section.figures] == ["Attacks"]


def lr_run(method="dense", lr=1e-3, heldout_loss=0.5, **values):
    return {"method": method, "lr": lr, "seed": 0, "heldout_loss": heldout_loss, "train_loss": heldout_loss,
            "steps": 8, "seconds": 3.0, "diverged": None, **values}  # fmt: skip


def save_rates(folder, runs, start=None):
    save(folder, "start.json", start or {"facts": {}, "state": {"heldout_loss": 2.0}})
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in runs))
    return folder


def test_a_sweep_of_learning_rates(tmp_path):
    """Two methods at three rates; one run diverged, one has a loss far above the others, and a line is half written."""
    runs = [lr_run(lr=5e-4, heldout_loss=0.7), lr_run(), lr_run(lr=2e-3, heldout_loss=None, diverged="NaN")]
    runs += [lr_run("ist", 5e-4, 0.9), lr_run("ist", heldout_loss=0.8), lr_run("ist", 2e-3, 90.0)]
    folder = save_rates(tmp_path / "lr", runs)
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"method": "gast", "lr"')
    told, section = of(folder)
    assert told == (
        "Lowest held-out loss of 6 runs, by method: 0.5000 with dense at 1e-3 and 0.8000 with ist at 1e-3; before "
        "training: 2.000."
    )
    (figure,) = section.figures
    drawing = str(figure.draw(548))
    assert drawing.count("<circle") == 4
    assert (drawing.count("×"), drawing.count("▲")) == (1, 1)
    assert drawing.count("<path") == 2
    assert [[cell.text for cell in row] for row in section.tables[0].rows] == [
        ["dense", "0.7000", "* 0.5000", "diverged"], ["ist", "0.9000", "* 0.8000", "90.0000"]
    ]  # fmt: skip
    assert "--method dense --lr 1e-3   held-out loss 0.5000" in section.words


def test_a_sweep_of_learning_rates_that_has_just_begun(tmp_path):
    told, section = of(save_rates(tmp_path / "lr", []))
    assert "no run is finished yet" in told
    told, empty = of(save_rates(tmp_path / "base", [], {"facts": {}, "state": {}}))  # not even the base's loss
    assert "no run is finished yet" in told
    assert not empty.words
    assert section.words == ["Before training the loss is 2.0000."]


BENCH = {
    "workload": {"model": ATTACK, "dtype": "bfloat16", "batch_size": 16, "length": 128, "rank": 32, "steps": 8},
    "rounds": 3, "hardware": "an abacus", "versions": {"torch": "2.9"},
    "methods": {
        "dense": {"seconds_per_step": 2.0, "fastest": 1.9, "slowest": 2.4, "peak_memory_mb": 3000.0,
                  "seconds_ratio": {"dense": 1.0}, "memory_ratio": {"dense": 1.0}},
        "ist": {"seconds_per_step": 1.8, "fastest": 1.7, "slowest": 1.9, "peak_memory_mb": 2400.0,
                "seconds_ratio": {"dense": 0.9}, "memory_ratio": {"dense": 0.8}},
    },
}  # fmt: skip


def test_costs(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(BENCH))
    told, section = of(path)
    assert told == "2 methods measured: a step takes from 1.80 s with ist to 2.00 s with dense."
    assert [cell.text for cell in section.tables[0].rows[1]] == [
        "ist", "1.8", "1.7–1.9", "0.90", "2,400", "0.80"
    ]  # fmt: skip
    assert [str(figure.draw(548)).count("<circle") for figure in section.figures] == [2, 2]
    assert ATTACK not in show(path).html


@pytest.mark.parametrize("change", [{"methods": {"dense": {}}}, {"methods": 3}, {"workload": None}])
def test_damaged_costs_are_told(tmp_path, change):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(BENCH | change))
    with pytest.raises(InputError, match=r"bench.json is not what siftune bench --out writes"):
        show(path)


@pytest.mark.parametrize("change", [{"method": "x"}, {"lr": 0}, {"lr": 1e999}, {"heldout_loss": "x"}, {"seed": None}])
def test_a_damaged_sweep_of_learning_rates_is_told(tmp_path, change):
    with pytest.raises(InputError, match=r"lr is no sweep of learning rates .*: run siftune find-lr again"):
        show(save_rates(tmp_path / "lr", [lr_run() | change]))


def test_a_kit(tmp_path):
    kit = small_kit(tmp_path / "kit")
    told, section = of(kit.path)
    middle = kit.manifest.middle
    assert told.startswith(f"A kit of a llama with {kit.manifest.depth} layers: 1 and 1 outer layers to tune")
    assert [row[0].text for row in section.tables[0].rows] == [str(shape.base) for shape in middle]
    assert section.tables[0].rows[0][1].text == str(middle[0].channels)
    assert section.tables[0].rows[0][2].text == ", ".join(
        f"{n.rpartition('.')[2]} {r}" for n, r in dict(middle[0].ranks).items()
    )


def test_a_damaged_kit_is_refused(tmp_path):
    kit = small_kit(tmp_path / "kit")
    path = kit.path / "manifest.json"
    path.write_text(path.read_text().replace('"llama"', f'"{ATTACK}"'))
    with pytest.raises(KitError, match="model_type"):
        show(kit.path)


@pytest.mark.parametrize(
    "points",
    [
        None,
        [{}],
        "x",
        [point(loss="wide")],
        [None],
        [point(calibration_auc=3)],
        [point(loss=1e999)],
        [point(loss=10**400)],
    ],
)
def test_a_damaged_sweep_is_told(tmp_path, points):
    with pytest.raises(InputError, match=r"sweep.json is no sweep .*: run siftune compare-emulators again"):
        show(save(tmp_path / "sweep", "sweep.json", {"points": points}))


@pytest.mark.parametrize(
    "value", [None, 3, "x", [], {"loss": 3}, {"loss": {"auc": {"value": "x"}}}, {"loss": {"auc": {"value": 10**400}}}]
)
def test_an_audit_shows_what_is_there(tmp_path, value):
    record = {"conditions": value, "comparisons": value, "membership": value, "calibration": value, "cosine": value}
    assert headline(find_subjects([str(save(tmp_path / "audit", "audit.json", record))])) == "Audit: no results."


@pytest.mark.parametrize(
    ("name", "record"), [("sweep.json", {"points": [point(method=ATTACK)]}), ("audit.json", AUDIT)]
)
def test_what_strangers_wrote_is_escaped(tmp_path, name, record):
    assert ATTACK not in show(save(tmp_path / ATTACK.replace("/", "_"), name, record)).html
