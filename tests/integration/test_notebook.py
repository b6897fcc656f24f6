"""The notebook of the documentation runs, and its outputs are those of a run."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_it_was_run_to_its_end_without_an_error():
    counts = [cell["execution_count"] for cell in code_cells()]
    assert counts == list(range(1, len(counts) + 1))
    kinds = [output["output_type"] for cell in code_cells() for output in cell["outputs"]]
    assert "error" not in kinds
    assert kinds.count("display_data") == 2


@pytest.mark.integration
def test_it_runs(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib").use("Agg")
    names = {}
    for cell in code_cells():
        exec("".join(cell["source"]).replace("max_steps=20", "max_steps=6"), names)  # it checks gradients itself
    assert len(names["drawn"]) == 6
    assert "largest difference" in capsys.readouterr().out
