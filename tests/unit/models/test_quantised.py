"""No gradient is lost where bitsandbytes would pack 4-bit weights for inference, in any Trainer and in loops."""

import pytest
import torch
from support.rounded import rounded
from support.tiny import batch, tiny
from transformers import Trainer, TrainingArguments

from siftune import GAST, IST
from siftune.base.errors import UnsupportedError
from siftune.models.adapters.attach import attach_adapter
from siftune.models.quantised import KeptUnpacked, refuse_packed

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def packs(monkeypatch):
    """Have it pack, as on processors with AVX-512 for bfloat16, where others lack the kernel, too."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


def evaluate(model):
    model.eval()
    with torch.no_grad():
        model(**batch(model))
    model.train()


def packed(model):
    return [bool(getattr(m.weight.quant_state, "packing_format_for_cpu", False)) for m in matrices(model)]


def matrices(model):
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def switches(model):
    return [module.support_avx512bf16_for_cpu for module in matrices(model)]


def test_matrices_stay_as_they_are_until_they_may_be_packed_again():
    model = rounded(4)
    kept = KeptUnpacked(model)
    evaluate(model)
    assert not any(packed(model))
    kept.remove()
    kept.remove()
    assert all(switches(model))
    refuse_packed(model)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_they_stay_so_while_one_of_two_keeps_them(order):
    model = rounded(4)
    both = [KeptUnpacked(model), KeptUnpacked(model)]
    both[order[0]].remove()
    both[order[0]].remove()
    assert not any(switches(model))
    both[order[1]].remove()
    assert all(switches(model))


def test_a_model_in_full_precision_has_nothing_to_keep():
    model = tiny("llama")
    KeptUnpacked(model).remove()
    refuse_packed(model)


@pytest.mark.parametrize(
    "callback", [IST(active=0.5, interval=1, score_batch_size=2), GAST(0.5, "rest")], ids=["ist", "gast"]
)
def test_gradients_are_complete_in_a_trainer_that_compares_layers_or_evaluates(tmp_path, callback):
    model = attach_adapter(rounded(4), rank=2)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(24).reshape(4, 6)]
    seen = []

    class Watched(Trainer):
        def training_step(self, *given):
            loss = super().training_step(*given)
            seen.append(any(packed(self.model)))
            return loss

    given = {"eval_strategy": "steps", "eval_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, **given)
    Watched(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback]).train()
    assert seen == [False] * 3
    assert all(switches(model))  # as it was


@pytest.mark.parametrize("method", [IST(), GAST(2, "rest")], ids=["ist", "gast"])
def test_a_packed_model_is_refused_and_left_as_it_is(method):
    model = attach_adapter(rounded(4), rank=2)
    state = matrices(model)[-1].weight.quant_state
    state.packing_format_for_cpu = True  # what packing leaves; the kernel may be missing
    with pytest.raises(UnsupportedError, match="packed the 4-bit weights"):
        method.attach(model, **({"batches": [batch(model)]} if isinstance(method, IST) else {}))
    assert all(switches(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
