"""Methods and adapters on the stand-in accelerator: the CPU's results, resumed runs, two devices, memory."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from rich.console import Console
from safetensors.torch import load_file
from support import standin
from support.adapted import checkpoint_whole_layers
from support.every_method import NAMES, attached
from support.standin import costs
from support.tiny import batch, tiny
from support.tiny_run import choices_of, recipe
from support.trainers import adapted, weights

from siftune.base.errors import InputError
from siftune.methods import METHODS
from siftune.methods.drivers.sample_choice import Choosing
from siftune.models.adapters.registry import ADAPTER_TYPES
from siftune.train.guards.memory import OutOfMemory
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

pytestmark = pytest.mark.compiled

QUIET = Console(quiet=True)
SUPPORTS = {"gast-rest": {"support": "rest"}, "gast-cosine": {"support": "rest", "score": "cosine"}}


def settings_of(method):
    name = method.partition("-")[0]
    return {"method": name, **SUPPORTS.get(method, {}), **({"select": 2} if "gast" in name else {})}


def run(base, rows, folder, **settings):
    """Device of a run of four steps, its choices, and the weights that it wrote."""
    settings = {"steps": 4, "dtype": "float32", "attention": "eager", **settings}
    done = train(recipe(base, rows, folder, **settings), QUIET)
    (written,) = done.folder.adapter.glob("*.safetensors")
    return next(done.model.parameters()).device.type, choices_of(folder), load_file(written)


def check_same_as_on_the_cpu(base, rows, tmp_path, **settings):
    """Choices are identical; their scores and the tuned weights are equal up to rounding."""
    device, *there = run(base, rows, tmp_path / "there", **settings)
    with standin.hidden():
        other, *here = run(base, rows, tmp_path / "here", **settings)
    assert (device, other) == ("standin", "cpu")
    for one, two in zip(*(choices for choices, _ in (there, here)), strict=True):
        for key, value in one.items():
            if key in ("importance", "losses", "scores"):
                assert value is two[key] or np.allclose(value, two[key], rtol=1e-4, atol=1e-7, equal_nan=True)
            else:
                assert value == two[key], key
    check_close(there[1], here[1])


def check_close(tuned, expected):
    """Equal up to rounding, of which Adam's first steps make up to the learning rate where a gradient is nearly 0."""
    assert tuned.keys() == expected.keys()
    for name, value in expected.items():
        difference = (tuned[name] - value).abs()
        assert difference.max() < 1e-3, name
        assert difference.mean() < 1e-5, name


@pytest.mark.parametrize("method", [*METHODS, *SUPPORTS])
def test_a_method_does_the_same_as_on_the_cpu(base, rows, tmp_path, method):
    check_same_as_on_the_cpu(base, rows, tmp_path, **settings_of(method))


def test_layers_that_checkpointing_runs_again_with_their_hooks_train_the_same(base, rows, tmp_path, monkeypatch):
    """Autograd runs them in a thread of its own, in which no training can be found."""
    checkpoint_whole_layers(tiny("llama"), monkeypatch, reentrant=False)
    check_same_as_on_the_cpu(base, rows, tmp_path, method="rst", clip=0.01)


def test_a_private_run_does_the_same_as_on_the_cpu(base, rows, tmp_path):
    with costs.secret():
        check_same_as_on_the_cpu(base, rows, tmp_path, method="dense", dp_epsilon=8.0, dp_delta=1e-3)


@pytest.mark.parametrize("adapter", [name for name in ADAPTER_TYPES if name != "lora"])
def test_an_adapter_learns_the_same_as_on_the_cpu(base, rows, tmp_path, adapter):
    rank = 2 if "rank" in ADAPTER_TYPES[adapter].keys else None
    check_same_as_on_the_cpu(base, rows, tmp_path, method="dense", adapter=adapter, rank=rank)


def test_tuned_layers_learn_the_same_as_on_the_cpu(base, rows, tmp_path):
    check_same_as_on_the_cpu(base, rows, tmp_path, method="ist", adapter="full")


def test_a_resumed_run_is_the_same_run(base, rows, tmp_path, monkeypatch):
    settings = {**settings_of("ist+gast"), "steps": 6, "save_every": 2}
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


def test_a_run_that_runs_out_of_memory_names_a_batch_that_fits(base, rows, tmp_path):
    settings = {"method": "gast", "support": "rest", "select": 0.5, "batch_size": 16, "max_length": 64, "rank": 8}
    smaller = {"batch_size": 8, "accumulate": 2}

    def peak(folder, **other):
        done = train(recipe(base, rows, tmp_path / folder, **{**settings, "steps": 2, **other}), QUIET)
        return done.summary["peak_memory_mb"] * 1e6

    large, small = peak("large"), peak("small", **smaller)
    assert small < 0.8 * large
    before = torch.accelerator.memory_allocated(0)
    with standin.limited(int((large + small) / 2) - before):
        with pytest.raises(OutOfMemory, match="--batch-size 8 --accumulate 2"):
            peak("run")
        assert peak("run", **smaller) < large


def test_a_generator_of_the_cpu_is_noticed(base, rows, tmp_path, monkeypatch):
    """A draw of uniform numbers on the device by the method's own generator, which is the CPU's, must fail."""

    def drawn_there(self, device):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self._uniform.shape, generator=generator, device=device, dtype=torch.float64)

    monkeypatch.setattr(Choosing, "uniform_on", drawn_there)
    with pytest.raises((RuntimeError, InputError), match="generator"):
        run(base, rows, tmp_path / "run", **settings_of("gast-rest"))
