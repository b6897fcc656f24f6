"""Methods on the stand-in accelerator: private and resumed runs, two devices, memory that runs out."""

import json
from contextlib import ExitStack

import pytest
import torch
from accelerate import dispatch_model
from rich.console import Console
from support import standin
from support.every_method import NAMES, attached
from support.tiny import batch
from support.tiny_run import choices_of, recipe
from support.trainers import adapted, weights

from siftune.base.errors import InputError
from siftune.methods.drivers.sample_choice import Choosing
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

pytestmark = pytest.mark.compiled

QUIET = Console(quiet=True)
SUPPORTS = {"gast-rest": {"support": "rest"}, "gast-cosine": {"support": "rest", "score": "cosine"}}


def settings_of(method):
    name = method.partition("-")[0]
    return {"method": name, **SUPPORTS.get(method, {}), **({"select": 2} if "gast" in name or name == "greats" else {})}


def run(base, rows, folder, **settings):
    """Choices and weights of a run of four steps."""
    settings = {"steps": 4, "dtype": "float32", "attention": "eager", **settings}
    done = train(recipe(base, rows, folder, **settings), QUIET)
    device = next(done.model.parameters()).device.type
    return device, choices_of(folder), {name: p.cpu() for name, p in weights(done.model).items()}


def test_private_training(base, rows, tmp_path):
    done = train(recipe(base, rows, tmp_path / "run", method="dense", dp_epsilon=8.0, dp_delta=1e-3, steps=3), QUIET)
    assert done.summary["steps"] == 3
    assert {p.device.type for p in done.model.parameters()} == {"standin"}


@pytest.mark.parametrize("method", ["dense", "ist", "gast", "ist+gast"])
def test_a_resumed_run_is_the_same_run(base, rows, tmp_path, method, monkeypatch):
    settings = {**settings_of(method), "steps": 6, "save_every": 2}
    _, choices, tuned = run(base, rows, tmp_path / "whole", **settings)
    plain = SiftTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(SiftTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(base, rows, tmp_path / "run", **settings)
    monkeypatch.setattr(SiftTrainer, "training_step", plain)
    _, found, again = run(base, rows, tmp_path / "run", **settings, resume=True)
    assert found == choices
    for name, value in tuned.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_over_two_devices(name):
    results = []
    for spread in (False, True):
        model = adapted()
        if spread:
            names = {"embed_tokens": 0, "rotary_emb": 0, "layers.0": 0, "layers.1": 0, "layers.2": 1, "layers.3": 1}
            places = {**{f"model.{key}": value for key, value in names.items()}, "model.norm": 1, "lm_head": 1}
            dispatch_model(model.get_base_model(), {key: f"standin:{value}" for key, value in places.items()})
        inputs = batch(model, 4)
        with ExitStack() as stack, torch.random.fork_rng():
            torch.manual_seed(0)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            sifts = attached(stack, name, model.train(), optimizer)
            for _ in range(3):
                model(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            last = sifts[-1].last
        if spread:
            assert len({p.device for p in model.parameters()}) == standin.DEVICES
        chosen = last.selected.tolist() if hasattr(last, "selected") else last.layers
        results.append((chosen, {key: value.cpu() for key, value in weights(model).items()}))
    assert results[0][0] == results[1][0]
    for key, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], value, rtol=1e-3, atol=1e-5)


def test_auto_batch_continues_with_fewer_rows(base, rows, tmp_path):
    settings = {"method": "gast", "support": "rest", "select": 0.5, "batch_size": 16, "max_length": 64, "rank": 8}

    def peak(folder, **other):
        done = train(recipe(base, rows, tmp_path / folder, **{**settings, "steps": 2, **other}), QUIET)
        return done.summary["peak_memory_mb"] * 1e6

    large, small = peak("large"), peak("small", batch_size=8, accumulate=2)
    assert small < 0.8 * large
    before = torch.accelerator.memory_allocated(0)
    with standin.limited(int((large + small) / 2) - before):
        assert peak("run", auto_batch=True) < large
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["status"] == "finished"
    assert "batch_size: 8" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_a_generator_of_the_cpu_is_noticed(base, rows, tmp_path, monkeypatch):
    """A draw of uniform numbers on the device by the method's own generator, which is the CPU's, must fail."""

    def drawn_there(self, device):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self._uniform.shape, generator=generator, device=device, dtype=torch.float64)

    monkeypatch.setattr(Choosing, "uniform_on", drawn_there)
    with pytest.raises((RuntimeError, InputError), match="generator"):
        run(base, rows, tmp_path / "run", **settings_of("gast-rest"))
