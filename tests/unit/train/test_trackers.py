"""Trackers are known and installed before a model is loaded."""

import pytest
from transformers.integrations import integration_utils

from siftune.base.errors import RecipeError
from siftune.cli.main import main
from siftune.train import prepare as module
from siftune.train.build import check_trackers


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard", "mlflow"])


@pytest.mark.parametrize("names", [("none",), ("tensorboard",), ("tensorboard", "mlflow")])
def test_what_is_there(names):
    check_trackers(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tensorbord",), "report_to has the unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        (("tensorboard,wandb",), "report_to has 'tensorboard,wandb': put spaces between trackers, not commas"),
        (("mlflow", "zzz"), "report_to has the unknown tracker 'zzz'; use one of azure_ml,"),
        (("wandb",), "the package of the tracker wandb is not installed: `pip install wandb`"),
        (("tensorboard", "azure_ml"), "`pip install azure-ml`"),
        (("none", "mlflow"), "report_to names trackers, or none and nothing else"),
        ((), "report_to names trackers, or none and nothing else"),
    ],
)
def test_what_is_refused(names, message):
    with pytest.raises(RecipeError) as caught:
        check_trackers(names)
    assert message in str(caught.value)


def test_it_comes_before_the_model(base, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "load_model", None)
    words = ["train", "--model", str(base), "--train", str(rows), "--out", str(tmp_path / "run")]
    assert main([*words, "--report-to", "tensorboard", "wandbb"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "siftune: error: report_to has the unknown tracker 'wandbb'; did you mean 'wandb'?"
    )
    assert not (tmp_path / "run").exists()
