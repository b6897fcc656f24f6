from dataclasses import replace

import pytest
import torch
from support.audits import QUICK, SPLIT, TOKENIZER, base, models, rows, same, shorter, snapshot

from siftune.base.errors import DataError, KitError, LayerError, TrainingError
from siftune.offsite.audits.audit import audit
from siftune.offsite.audits.models import OffsiteModels, plugged, read_outer, restored
from siftune.offsite.emulator.model import Split, outer_names


def test_half_precision_comes_back_bit_for_bit():
    model = base().bfloat16()
    both = OffsiteModels(model, shorter(model), SPLIT, TOKENIZER)
    before = [snapshot(one) for one in (both.base, both.emulator)]
    audit(both, rows(False), replace(QUICK, steps=1, recovery=True))
    assert same(both.base, before[0])
    assert same(both.emulator, before[1])


def test_models_that_share_their_tensors_come_back():
    model = base()
    emulator = shorter(model)
    for number, source in enumerate((0, 1, 3, 4)):  # all layers, as parts that were not compressed are shared
        for name, parameter in model.model.layers[source].named_parameters():
            emulator.model.layers[number].get_parameter(name).data = parameter.data
    both = OffsiteModels(model, emulator, SPLIT, TOKENIZER)
    before = snapshot(model)
    found = audit(both, rows(False), replace(QUICK, recovery=True))
    assert same(model, before)
    apart = audit(models(), rows(False), replace(QUICK, recovery=True))
    for name, one in apart.conditions.items():
        assert found.conditions[name].scores.nll.tolist() == one.scores.nll.tolist()


@pytest.mark.parametrize(
    ("break_at", "at"), [("Full FT: tuning", 0), ("Emulator FT: tuning", 1), ("Plug-in: measuring", 0)]
)
def test_models_come_back_after_an_interruption(break_at, at):
    model = base().bfloat16()
    both = OffsiteModels(model, shorter(model), SPLIT, TOKENIZER)
    before = [snapshot(one) for one in (both.base, both.emulator)]

    def stop(what, done, total):
        if what == break_at and done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(both, rows(False), QUICK, progress=stop)
    assert same(both.base, before[0])
    assert same(both.emulator, before[1])


def test_a_loss_of_nan_is_one_sentence():
    both = models()
    with pytest.raises(TrainingError, match="loss is nan"):
        audit(both, rows(False), replace(QUICK, lr=1e30))


def test_other_models_are_refused():
    both = models()
    other = base()
    other.model.layers[-1].self_attn.q_proj.weight.data[0, 0] *= 1.05
    with pytest.raises(KitError, match=r"last\.0\.self_attn\.q_proj\.weight"):
        audit(replace(both, base=other), rows(False), QUICK)
    wide = base()
    wide.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 64, bias=False)
    with pytest.raises(KitError, match=r"first\.0\.mlp\.up_proj\.weight"):
        audit(replace(both, base=wide), rows(False), QUICK)
    biased = base()
    biased.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(48))
    with pytest.raises(KitError, match=r"first\.0\.mlp\.up_proj\.bias"):
        audit(replace(both, base=biased), rows(False), QUICK)
    with pytest.raises(LayerError, match="no middle"):
        audit(replace(both, split=Split(2, 2)), rows(False), QUICK)


def test_other_returns_are_refused():
    both = models()
    right = read_outer(both.base, SPLIT)
    name = "last.0.mlp.up_proj.weight"
    with pytest.raises(KitError, match=name):
        audit(both, rows(False), QUICK, {key: t for key, t in right.items() if key != name})


def test_rows_without_labels_are_refused():
    data = rows(False)
    bare = data.held_out.map(
        lambda row, i: {"labels": [-100] * len(row["labels"])} if i == 3 else row, with_indices=True
    )
    with pytest.raises(DataError, match="row 3 has no label"):
        audit(models(), replace(data, held_out=bare), QUICK)


def test_swaps():
    model = base()
    tensors = {name: t + 1 for name, t in read_outer(model, SPLIT).items()}
    before = snapshot(model)
    names = set(outer_names(model, SPLIT).values())

    def inside():
        with plugged(model, SPLIT, tensors):
            assert all(torch.equal(t, before[0][n] + (n in names)) for n, t in model.state_dict().items())
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        inside()
    assert same(model, before)
    with restored(model):
        for p in model.parameters():
            p.data.zero_()
    assert same(model, before)
