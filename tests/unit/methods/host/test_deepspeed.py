"""What DeepSpeed's engine is given, and what is refused, without DeepSpeed; tests/distributed has its runs."""

from types import SimpleNamespace

import pytest
import torch
from support.trainers import adapted, arguments, weights
from transformers import Trainer

from siftune import GAST, RST
from siftune.base.errors import UnsupportedError
from siftune.engine.groups import group_by_layer, outside
from siftune.methods.host.deepspeed import _LAYER, prepare, refuse_in_loops, skip, split_by_layer


def divided(model):
    """AdamW in two groups of other weight decay, as the Trainer makes it, divided by layer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    split_by_layer(optimizer, model)
    return optimizer


def test_no_group_has_parameters_of_two_layers():
    model = adapted()
    model.get_output_embeddings().weight.requires_grad_(True)  # in no layer
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = divided(model)
    for group in optimizer.param_groups:
        own = {id(p) for p in group["params"]}
        layers = [g for g in group_by_layer(model) if own & {id(p) for p in g.parameters.values()}]
        if group[_LAYER] < 0:
            assert own == {id(p) for p in outside(model, group_by_layer(model)).values()}
        else:
            assert [g.index for g in layers] == [group[_LAYER]]
        for parameter in group["params"]:
            place = next(at for at, p in enumerate(trained) if p is parameter)
            assert group["weight_decay"] == (0.0 if place % 2 else 0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trained)
    again = [(g[_LAYER], list(map(id, g["params"]))) for g in optimizer.param_groups]
    split_by_layer(optimizer, model)
    assert [(g[_LAYER], list(map(id, g["params"]))) for g in optimizer.param_groups] == again


def test_layers_that_do_not_train_keep_values_and_state():
    """Group by group, as ZeRO steps; a layer that sits out is as if its gradients had been None."""
    found = []
    for way in ("skipped", "None"):
        model = adapted()
        optimizer = divided(model)
        idle = set()
        if way == "skipped":
            skip(optimizer, idle.copy)
        for step in range(3):
            if step:
                idle.update({0, 3})
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    sits_out = way == "None" and group[_LAYER] in idle
                    parameter.grad = None if sits_out else torch.ones_like(parameter)
            whole = optimizer.param_groups
            for group in whole:
                optimizer.param_groups = [group]
                optimizer.step()
            optimizer.param_groups = whole
        states = {g[_LAYER]: len([p for p in g["params"] if p in optimizer.state]) for g in optimizer.param_groups}
        found.append((weights(model), states))
    (skipped, states), (wanted, kept) = found
    assert all(torch.equal(skipped[name], value) for name, value in wanted.items())
    assert states == kept
    assert min(kept.values()) > 0


def test_an_optimizer_that_holds_all_layers_in_one_piece_is_refused():
    optimizer = torch.optim.AdamW([p for p in adapted().parameters() if p.requires_grad])
    with pytest.raises(UnsupportedError, match="optimizer"):
        skip(optimizer, set)


def stand_in(tmp_path, zero):
    """A Trainer as it is where DeepSpeed is on, before its engine is made."""
    trainer = Trainer(adapted(), arguments(tmp_path))
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config={"zero_optimization": zero}))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    return trainer


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, 100_000), ({"stage3_param_persistence_threshold": 0}, "largest"),
     ({"stage3_param_persistence_threshold": "auto"}, "auto")],
)  # fmt: skip
def test_what_trains_stays_whole_in_stage_3(tmp_path, given, wanted):
    zero = {"stage": 3, **given}
    trainer = stand_in(tmp_path, zero)
    prepare(trainer, apart=False)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    largest, auto = max(p.numel() for p in trained), 10 * trainer.model.config.hidden_size
    assert zero["stage3_param_persistence_threshold"] == {"largest": largest, "auto": max(auto, largest)}.get(
        wanted, wanted
    )
    assert not any(_LAYER in group for group in trainer.create_optimizer().param_groups)
    prepare(trainer)
    assert all(_LAYER in group for group in trainer.create_optimizer().param_groups)


def test_nothing_is_done_without_deepspeed_and_no_threshold_set_in_stage_2(tmp_path):
    trainer = Trainer(adapted(), arguments(tmp_path))
    prepare(trainer)
    assert not any(_LAYER in group for group in trainer.create_optimizer().param_groups)
    for zero in ({"stage": 2}, {}):
        given = dict(zero)
        prepare(stand_in(tmp_path, given))
        assert given == zero


@pytest.mark.parametrize("method", [RST(active=0.5), GAST(select=2, support="rest")])
def test_an_engine_in_a_loop_of_ones_own_is_refused(method):
    model = adapted()
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    refuse_in_loops(SimpleNamespace(optimizer=inner))  # accelerate's wrapper is none
    refuse_in_loops(type("FusedAdam", (torch.optim.AdamW,), {"__module__": "deepspeed.ops.adam"})(model.parameters()))
    engine = type("Zero", (), {"__module__": "deepspeed.runtime.zero", "optimizer": inner})()
    with pytest.raises(UnsupportedError, match="DeepSpeed"):
        method.attach(model, optimizer=engine)
    with method.attach(model, optimizer=inner):
        pass
