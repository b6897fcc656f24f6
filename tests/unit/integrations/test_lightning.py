"""Lightning's Trainer trains to the bit what a plain loop with `attach` does, and resumes from its own checkpoints."""

import doctest
from types import SimpleNamespace

import pytest
import torch
from support.trainers import adapted, rows, weights
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from siftune import GAST, IST, RST
from siftune.base.errors import ModelError, RecipeError, UnsupportedError
from siftune.methods.drivers.batches import RowDraws

lightning = pytest.importorskip("lightning.pytorch", reason="pip install lightning")
from siftune.integrations.lightning import Sift  # noqa: E402

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "use_distributed_sampler": False,
}  # fmt: skip
METHODS = {
    "gast-sample": lambda: GAST(select=2, support_size=3),
    "gast-averaged": lambda: GAST(select=2, support_size=3, support_every=2),
    "gast-rest": lambda: GAST(select=2, support="rest"),
    "ist": lambda: IST(active=0.5, interval=2, score_batch_size=4),
    "rst": lambda: RST(active=0.5),
}


class Module(lightning.LightningModule):
    """A causal LM with adapters, and AdamW."""

    def __init__(self, model=None):
        super().__init__()
        self.net = model if model is not None else adapted()

    def training_step(self, batch, _):
        return self.net(**batch).loss

    test_step = training_step

    def configure_optimizers(self):
        return optimizer_of(self.net)


def optimizer_of(model):
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def loader():
    return DataLoader(rows().with_format("torch"), batch_size=4)


def fit(sift, module=None, resume=None, data=None, **settings):
    module = module or Module()
    trainer = lightning.Trainer(**{**QUIET, "max_steps": 6, **settings}, callbacks=[sift])
    trainer.fit(module, data or loader(), ckpt_path=resume)
    return module, trainer


def plain_loop(method, accumulate=1, clip=None):
    """The oracle: six batches of a loop that has nothing of Lightning."""
    model = adapted()
    model.train()
    optimizer = optimizer_of(model)
    given = {"batches": ()} if hasattr(method, "support_source") or isinstance(method, IST) else {}
    if getattr(method, "support_source", "sample") is None:
        given = {}
    with method.attach(model, optimizer=optimizer, **given) as selection:
        if given:
            selection.draws = RowDraws(loader().dataset, loader().collate_fn, selection.generator)
        for number, batch in enumerate(loader()):
            (model(**batch).loss / accumulate).backward()
            if number % accumulate == accumulate - 1:
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return model


def assert_same(first, second):
    for name, value in weights(first).items():
        assert torch.equal(weights(second)[name], value), name


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_what_a_plain_loop_does(name):
    module, _ = fit(Sift(METHODS[name]()))
    assert_same(plain_loop(METHODS[name]()), module.net)


@pytest.mark.parametrize("name", ["gast-averaged"])
def test_with_accumulation_and_clipping(name):
    module, _ = fit(Sift(METHODS[name]()), max_steps=3, accumulate_grad_batches=2, gradient_clip_val=0.01)
    assert_same(plain_loop(METHODS[name](), accumulate=2, clip=0.01), module.net)


def test_a_run_goes_on_from_lightnings_checkpoint(tmp_path):
    for make in (METHODS["gast-averaged"], METHODS["ist"]):
        whole, _ = fit(Sift(make()), max_steps=-1, max_epochs=2)
        _, trainer = fit(Sift(make()), max_steps=-1, max_epochs=1)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        second, _ = fit(Sift(make()), resume=tmp_path / "half.ckpt", max_steps=-1, max_epochs=2)
        assert_same(whole.net, second.net)


def test_a_training_after_a_test_of_a_checkpoint_begins_anew(tmp_path):
    sift = Sift(METHODS["ist"]())
    first, trainer = fit(sift)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    trainer.test(first, loader(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    assert_same(first.net, fit(sift)[0].net)
    assert sift.selection.steps == 6


def test_several_methods():
    sift = [Sift(RST(active=0.5)), Sift(GAST(select=2, support="rest"))]
    module = Module()
    trainer = lightning.Trainer(**QUIET, max_steps=2, callbacks=sift)
    trainer.fit(module, loader())
    layers, chosen = (each.selection.last for each in sift)
    assert len(layers.layers) == 2
    assert chosen.selected.shape == (2, 2)  # of the layers that train
    assert not module.net.get_base_model()._forward_pre_hooks


class Fails(Module):
    def on_train_batch_end(self, *_):
        raise KeyError("here")


def test_the_model_is_left_as_it_was_also_by_an_error():
    for kind in (Module, Fails):
        module = kind()
        hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
        sift = Sift(GAST(select=2, support="rest"))
        try:
            fit(sift, module, max_steps=1)
        except KeyError:
            assert kind is Fails
        assert sift.selection.last is not None
        assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()] == hooks
        batch = next(iter(loader()))
        module.net(**batch).loss.backward()
        assert all(p.grad is not None for p in module.net.parameters() if p.requires_grad)


class Two(Module):
    def configure_optimizers(self):
        self.automatic_optimization = False
        return [optimizer_of(self.net), optimizer_of(self.net)]


def test_what_cannot_be_attached_is_refused():
    with pytest.raises(RecipeError, match=r"Sift takes a method.*TrainerCallback is none"):
        Sift(TrainerCallback())
    with pytest.raises(RecipeError, match="one optimizer, and there are 2"):
        fit(Sift(RST()), Two())
    with pytest.raises(ModelError, match="Module holds no transformers or PEFT model"):
        fit(Sift(RST()), Module(torch.nn.Linear(2, 2)))
    with pytest.raises(RecipeError, match="batches"):
        fit(Sift(GAST(support="dataset")))
    with pytest.raises(RecipeError, match=r"the training rows are a list.*Sift\(..., batches=...\)"):
        fit(Sift(GAST()), data=list(loader()))


def test_rows_to_compare_with_may_be_given():
    given = list(loader())[:1]
    sift = Sift(GAST(select=2, support="dataset"), batches=given)
    fit(sift, max_steps=2)
    assert sift.selection.draws.taken == 3  # two steps, and the third that has begun


def test_strategies_that_shard_are_refused():
    sharding = SimpleNamespace(strategy=type("FSDPStrategy", (), {})())
    with pytest.raises(UnsupportedError, match="FSDPStrategy shards the adapters"):
        Sift(RST()).on_train_start(sharding, Module())


def test_the_example():
    (test,) = doctest.DocTestFinder(recurse=False).find(Sift, "Sift", module=False)
    test.globs = {"Sift": Sift, "GAST": GAST, "module": Module(), "loader": loader(), "quiet": QUIET}
    assert doctest.DocTestRunner().run(test).failed == 0
