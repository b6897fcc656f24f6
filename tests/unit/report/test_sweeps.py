"""Sweeps of learning rates on a page."""

import pytest

from siftune.base.errors import InputError
from siftune.base.work_folder import record_text
from siftune.report import show
from siftune.report.compare import headline
from siftune.report.page import sections
from siftune.report.subjects import find_subjects


def of(folder):
    subjects = find_subjects([str(folder)])
    (section,) = sections(subjects)
    return headline(subjects), section


def lr_run(method="dense", lr=1e-3, heldout_loss=0.5, **values):
    return {"method": method, "lr": lr, "seed": 0, "heldout_loss": heldout_loss, "train_loss": heldout_loss,
            "steps": 8, "seconds": 3.0, "diverged": None, **values}  # fmt: skip


def save_rates(folder, *runs):
    folder.mkdir()
    state = {"base_heldout_loss": 2.0, "runs": runs} if runs else {}
    (folder / "rates.json").write_text(record_text({}, state))
    return folder


def test_a_sweep_of_learning_rates(tmp_path):
    """Two methods at three rates; one run diverged."""
    runs = [lr_run(lr=5e-4, heldout_loss=0.7), lr_run(), lr_run(lr=2e-3, heldout_loss=None, diverged="NaN")]
    runs += [lr_run("ist", 5e-4, 0.9), lr_run("ist", heldout_loss=0.8), lr_run("ist", 2e-3, 90.0)]
    told, section = of(save_rates(tmp_path / "lr", *runs))
    assert told == (
        "Lowest held-out loss of 6 runs, by method: 0.5000 with dense at 1e-3 and 0.8000 with ist at 1e-3; before "
        "training: 2.000."
    )
    assert [[cell.text for cell in row] for row in section.tables[0].rows] == [
        ["dense", "0.7000", "* 0.5000", "diverged"], ["ist", "0.9000", "* 0.8000", "90.0000"]
    ]  # fmt: skip
    assert "--method dense --lr 1e-3   held-out loss 0.5000" in section.words


def test_a_sweep_of_learning_rates_that_has_just_begun(tmp_path):
    told, section = of(save_rates(tmp_path / "lr"))
    assert "no run is finished yet" in told
    assert not section.words


def test_what_strangers_wrote_is_escaped(tmp_path):
    html = show(save_rates(tmp_path / "<script>alert(1)", lr_run())).html
    assert "Learning rates in &lt;script&gt;alert(1)" in html
    assert "<script>alert(1)" not in html


@pytest.mark.parametrize("change", [{"method": "x"}, {"lr": 0}, {"lr": 1e999}, {"heldout_loss": "x"}, {"seed": None}])
def test_a_damaged_sweep_of_learning_rates_is_told(tmp_path, change):
    with pytest.raises(InputError, match=r"rates\.json is no record"):
        show(save_rates(tmp_path / "lr", lr_run() | change))
