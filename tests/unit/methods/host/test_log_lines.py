"""What methods tell in the log of any Trainer, and of siftune's own: trackers get it, once."""

import json

import pytest
import torch
from rich.console import Console
from support.every_method import NAMES, built
from support.tiny_run import lines, recipe
from support.trainers import adapted, rows, train
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

from siftune import GAST, IST
from siftune.methods import METHODS
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.methods.host.callback import LogLines, stand_first
from siftune.train import run as module


class Tracker(TrainerCallback):
    """Reads lines as trackers do: it stands among the Trainer's own callbacks."""

    seen: list = []  # noqa: RUF012 - of the class, since the Trainer makes the object

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.fixture
def tracker(monkeypatch):
    monkeypatch.setattr(Tracker, "seen", [])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    return Tracker


FIGURES = {
    "gast": {"gast/followed", "gast/score", "gast/score_followed"},
    "ist": {"ist/layers", "ist/importance_spread"},
    "rst": {"rst/layers"},
}


@pytest.mark.parametrize("name", ["rst", "ist+gast"])
def test_a_tracker_of_any_trainer_gets_the_figures(tmp_path, tracker, name):
    methods = built(name)
    _, trainer = train(tmp_path, *methods, report_to="tensorboard", max_steps=4, logging_steps=2)
    wanted = set.union(*(FIGURES[part.settings.group] for part in METHODS[name].parts))
    on_training = [line for line in tracker.seen if "loss" in line]
    assert len(on_training) == 2
    for line, kept in zip(on_training, trainer.state.log_history, strict=False):
        own = {key for key in line if "/" in key}
        assert own == wanted
        assert {key: kept[key] for key in own} == {key: line[key] for key in own}
    assert not any("/" in key for line in tracker.seen if "loss" not in line for key in line)
    layers = [len(choice.layers) for choice in methods[0].all if not hasattr(choice, "selected")]
    if layers:
        assert on_training[0][f"{methods[0].group}/layers"] == sum(layers[:2]) / 2
    assert not any(isinstance(callback, LogLines) for callback in trainer.callback_handler.callbacks)


def test_shares_and_scores_are_means_over_the_batches_since_the_last_line(tmp_path, tracker):
    gast = GAST(select=2, support="rest", keep=True)
    train(tmp_path, gast, report_to="tensorboard", max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    first, second = [line for line in tracker.seen if "loss" in line]
    for line, choices in ((first, gast.history[:4]), (second, gast.history[4:])):
        assert line["gast/followed"] == 0.5
        assert line["gast/score"] == pytest.approx(
            float(torch.stack([choice.scores.mean() for choice in choices]).mean()), abs=1e-5
        )
        chosen = [choice.scores.gather(1, choice.selected).mean() for choice in choices]
        assert line["gast/score_followed"] == pytest.approx(float(torch.stack(chosen).mean()), abs=1e-5)


def test_the_spread_is_that_of_the_importance(tmp_path, tracker):
    ist = IST(active=0.5, interval=1, score_batch_size=4)
    train(tmp_path, ist, report_to="tensorboard", max_steps=3, logging_steps=3)
    [line] = [line for line in tracker.seen if "loss" in line]
    assert line["ist/importance_spread"] == pytest.approx(float(ist.importance.max() - ist.importance.min()), abs=1e-5)
    assert line["ist/importance_spread"] > 0


def test_a_run_of_ours_tells_trackers_all_and_once(base, rows, tmp_path, tracker):
    given = recipe(base, rows, tmp_path / "run", method="ist+gast", support="rest", report_to=("tensorboard",))
    module.train(given, Console(quiet=True))
    on_training = [line for line in tracker.seen if "loss" in line]
    assert len(on_training) == 6
    written = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    for line, record in zip(on_training, written, strict=True):
        assert {"ist/layers", "gast/followed", "peak_memory_mb"} <= set(line)
        assert "tokens_per_second" in line or record["step"] == 1
        assert {**line, "step": record["step"]} == record
    assert len(written) == 6


def test_figures_of_a_choice():
    scores = torch.tensor([[1.0, 2.0, 6.0], [3.0, torch.nan, 5.0]])
    choice = SampleChoice(0, 0, ("a", "b"), (0, 1), scores, torch.tensor([[1], [2]]))
    assert choice.figures() == {"followed": pytest.approx(1 / 3), "score": pytest.approx(3.4), "score_followed": 3.5}
    nothing = SampleChoice(0, 0, ("a",), (0,), torch.full((1, 3), torch.nan), torch.tensor([[0, 1, 2]]))
    assert nothing.figures() == {"followed": 1.0}


def test_a_callback_stands_first_once():
    class One(TrainerCallback):
        pass

    trainer = Trainer(adapted(), train_dataset=rows())
    one, before = One(), list(trainer.callback_handler.callbacks)
    for _ in range(2):
        stand_first(trainer, one)
        assert trainer.callback_handler.callbacks == [one, *before]


def test_a_run_that_fails_takes_its_lines_along(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise OSError("no luck")

    gast, kept = GAST(select=2, support="rest"), []

    class Catch(Trainer):
        def train(self, *args, **kwargs):
            kept.append(self)
            return super().train(*args, **kwargs)

    with pytest.raises(OSError, match="no luck"):
        train(tmp_path, gast, Fail(), trainer=Catch)
    gast.remove()
    assert not any(isinstance(callback, LogLines) for callback in kept[0].callback_handler.callbacks)


@pytest.mark.parametrize("name", NAMES)
def test_a_callback_says_its_settings(name):
    for method in built(name):
        text = repr(method)
        assert text.startswith(f"{type(method).__name__}(")
        for key, value in method.to_dict().items():
            assert f"{key}={value!r}" in text
        assert "support_set" not in text


def test_epsilon_is_told(base, rows, tmp_path):
    pytest.importorskip("opacus")
    given = recipe(
        base, rows, tmp_path / "run", method="dense", dp_epsilon=8.0, dp_delta=1e-3, batch_size=4, steps=4, log_every=2
    )
    done = module.train(given, Console(quiet=True))
    told = [line["dp/epsilon"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert told == sorted(told)
    assert told[-1] == pytest.approx(done.summary["privacy"]["epsilon"], abs=1e-5)
    assert json.dumps(told)
