"""The penalty in transformers' Trainer: its gradient, accumulation, checkpointing, resuming, methods beside it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.every_method import NAMES, built
from support.tiny import batch, tiny
from support.trainers import adapted, arguments, rows, train, weights
from torch import nn
from transformers import TrainerCallback, TrainerState

from siftune import IST, Keep
from siftune.base.errors import DataError, RecipeError, SiftuneError, UnsupportedError
from siftune.data.batches import Collator
from siftune.data.sampled_texts import sample_texts
from siftune.engine.groups import group_by_layer
from siftune.engine.suppression import suppress
from siftune.methods.keep.callback import Penalty, training_prompts


def complete(model, one):
    """The mean KL to the model without adapters over labels, from complete distributions."""
    mask = one["labels"][:, 1:] != -100
    inputs = {name: one[name] for name in ("input_ids", "attention_mask")}
    tuned = model(**inputs).logits[:, :-1][mask].log_softmax(-1)
    groups = group_by_layer(model)
    with torch.no_grad(), suppress(groups, range(len(groups)), 0.0):
        base = model(**inputs).logits[:, :-1][mask].log_softmax(-1)
    return (base.exp() * (base - tuned)).sum(-1).mean()


@pytest.fixture
def all_tokens(monkeypatch):
    monkeypatch.setattr("siftune.methods.keep.callback.TOP", 1000)


@pytest.mark.parametrize("adapter", ["lora", "dora", "series", "parallel", "ia3"])
def test_gradient_is_that_of_the_complete_divergence(all_tokens, adapter):
    model = adapted(kind=adapter, **({} if adapter in ("lora", "dora") else {"rank": None})).double()
    if adapter == "ia3":
        model = model.apply(lambda module: None)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(parameter, 1.0, 0.2)
    one = batch(model, rows=3)
    value = Penalty(model, [one]).add_gradient(0, factor=2.0)
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss = complete(model, one)
    (2 * loss).backward()
    torch.testing.assert_close(value, loss.detach())
    assert value > 1e-3
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad)


def test_groups_come_once_each_before_one_comes_again():
    model = adapted()
    penalty = Penalty(model, [batch(model)] * 5, seed=3)
    visits = [penalty.group_of(step) for step in range(15)]
    assert [sorted(visits[start : start + 5]) for start in (0, 5, 10)] == [list(range(5))] * 3
    assert visits[:5] != visits[5:10]


def test_ranks_have_different_groups(monkeypatch):
    model = adapted()
    monkeypatch.setattr("siftune.methods.keep.callback.world_size", lambda: 2)
    visits = []
    for rank in (0, 1):
        monkeypatch.setattr("siftune.methods.keep.callback.rank", lambda rank=rank: rank)
        penalty = Penalty(model, [batch(model)] * 6, seed=3)
        visits += [penalty.group_of(step) for step in range(3)]
    assert sorted(visits) == list(range(6))


class Gradients(TrainerCallback):
    """The gradients of each step before clipping."""

    def __init__(self, model):
        self.model, self.all = model, []

    def on_pre_optimizer_step(self, *_, **__):
        self.all.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})


def gradients(folder, *callbacks, **settings):
    model = settings.pop("model", None) or adapted()
    watch = Gradients(model)
    train(folder, *callbacks, watch, model=model, max_steps=1, max_grad_norm=0.0, **settings)
    return watch.all[0]


def keeping(**settings):
    return Keep(rows(6, seed=5), **{"size": 2, "weight": 3.0, "every": 1, **settings})


CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 3}, CHECKPOINTING], ids=["plain", "accumulated", "checkpointed"]
)
def test_gradient_of_a_step_has_the_penalty_once(tmp_path, settings):
    with_it, without = (gradients(tmp_path, *callbacks, **settings) for callbacks in ([keeping()], []))
    model = adapted()
    model.train()
    keep = keeping()
    penalty = Penalty(model, _batches(keep))
    penalty.add_gradient(0, 3.0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(with_it[name] - without[name], parameter.grad, rtol=1e-3, atol=1e-5)


def _batches(keep):
    parts = [keep.rows[start : start + keep.size] for start in range(0, len(keep.rows), keep.size)]
    return [{name: torch.tensor(values) for name, values in part.items()} for part in parts]


@pytest.mark.parametrize("name", NAMES)
def test_methods_choose_as_without_it_and_the_penalty_follows_their_layers(tmp_path, name):
    plain, methods = built(name), built(name)
    for callback in (*plain, *methods):
        callback.on_select = callback.all.append
    without = gradients(tmp_path, *plain)
    with_it = gradients(tmp_path, keeping(), *methods)  # listed first, it comes last all the same
    assert set(with_it) == set(without)
    for one, other in zip(plain, methods, strict=True):
        assert [_chosen(each) for each in one.all] == [_chosen(each) for each in other.all]
    alone = Penalty(adapted(), _batches(keeping()))
    alone.add_gradient(0, 3.0)
    wanted = {name: p.grad for name, p in alone._model.named_parameters() if p.requires_grad}
    for name_, value in with_it.items():
        if not hasattr(plain[0], "policy"):  # with inactive layers below, the same gradient too
            torch.testing.assert_close(value - without[name_], wanted[name_], rtol=1e-3, atol=1e-5)
        assert not torch.equal(value, without[name_])


def _chosen(choice):
    return choice.layers if hasattr(choice, "moved") else choice.selected.tolist()


def test_penalty_has_the_scale_of_the_loss(tmp_path, monkeypatch):
    """As in float16, where the Trainer multiplies losses before backward and divides gradients before the step."""
    by_scale = {}
    for scale in (None, 8.0):
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda scale=scale: scale)
        fake = SimpleNamespace(
            accelerator=SimpleNamespace(scaler=scaler), compute_loss_context_manager=nullcontext,
            callback_handler=SimpleNamespace(callbacks=[]),
        )  # fmt: skip
        monkeypatch.setattr("siftune.methods.keep.callback.calling_trainer", lambda _, fake=fake: fake)
        model, keep, state = adapted(), Keep(rows(2, seed=5)), TrainerState()
        loader = SimpleNamespace(collate_fn=Collator(0))
        keep.on_train_begin(arguments(tmp_path), state, None, model=model, train_dataloader=loader)
        keep.on_step_begin(arguments(tmp_path), state, None)
        by_scale[scale] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in by_scale[None].items():
        torch.testing.assert_close(by_scale[8.0][name], 8 * grad)


def test_resumed_run_is_the_same_with_own_texts(tmp_path):
    def own():
        return Keep(texts=8, length=6, size=2, weight=3.0)  # in every second step

    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    complete_, _ = train(tmp_path / "one", own(), **settings)
    checkpoint = tmp_path / "one" / "checkpoint-3"
    resumed, _ = train(tmp_path / "two", own(), resume=str(checkpoint), **settings)
    for name, value in weights(complete_).items():
        assert torch.equal(weights(resumed)[name], value)


def test_own_texts_are_the_base_s_whatever_the_adapter_half_of_them_after_prompts(tmp_path):
    keep, data = Keep(texts=6, length=7), rows()
    train(tmp_path, keep, model=adapted(), dataset=data, max_steps=1)
    prompted = [text for text in keep._own if text["labels"][1] == -100]
    free = [text for text in keep._own if text["labels"][1] != -100]
    prompts = [text["input_ids"][:2] for text in prompted]
    assert len(prompted) == len(free) == 3
    assert all(prompt in [row[:2] for row in data["input_ids"]] for prompt in prompts)
    in_order = sample_texts(tiny("llama"), 6, 7, 0, training_prompts(data, 3, seed=0), least=8)
    assert sorted(keep._own, key=str) == sorted(in_order, key=str)
    assert all(text["labels"][2:] == text["input_ids"][2:] for text in prompted)
    assert all(text["labels"][1:] == text["input_ids"][1:] for text in free)
    assert all(len(text["input_ids"]) == 7 or text["input_ids"][-1] == 2 for text in free)
    assert all(len(text["input_ids"]) == 10 or text["input_ids"][-1] == 2 for text in prompted)


def test_prompts_of_training_rows():
    """A prompt is what precedes the first label, also by TRL's masks."""
    ids = [5, 6, 7, 8]
    forms = [{"labels": [-100, -100, 7, 8]}, {"completion_mask": [0, 0, 1, 1]}, {"assistant_masks": [0, 0, 1, 0]}]
    for form in forms:
        assert training_prompts([{"input_ids": ids, **form}] * 9, 4, seed=0) == [[5, 6]] * 4
    for form in (
        {},
        {"labels": ids},
        {"labels": [-100, *ids[1:]]},
        {"labels": [-100] * 4},
        {"completion_mask": [0] * 4},
    ):
        assert training_prompts([{"input_ids": ids, **form}], 4, seed=0) == []
    data = rows(20)
    assert training_prompts(data, 8, seed=0) != training_prompts(data, 8, seed=1)
    assert training_prompts(data.to_iterable_dataset(), 8, seed=0) == []


def test_pass_in_every_third_step_counts_three_times(tmp_path):
    noted = {}
    for every in (1, 3):
        model = adapted()
        watch = Gradients(model)
        keep = Keep(rows(2, seed=5), weight=2.0, every=every)
        train(tmp_path, keep, watch, model=model, max_steps=3, learning_rate=1e-12, max_grad_norm=0.0)
        noted[every] = watch.all
    plain = Gradients(adapted())
    train(tmp_path, plain, model=plain.model, max_steps=3, learning_rate=1e-12, max_grad_norm=0.0)
    for step, factor in ((0, 3), (1, 0), (2, 0)):
        for name, grad in plain.all[step].items():
            penalty = noted[1][step][name] - grad
            torch.testing.assert_close(noted[3][step][name] - grad, factor * penalty, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"size": 0}, {"texts": -1}])
def test_settings_out_of_range(settings):
    with pytest.raises(RecipeError):
        Keep(**settings)


def test_refuses_weights_whose_base_is_not_the_suppressed_model(tmp_path):
    model = adapted()
    model.get_output_embeddings().weight.requires_grad_()
    with pytest.raises(UnsupportedError, match=r"lm_head.* trains"):
        train(tmp_path, keeping(), model=model)


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA", "lora_ga"])
def test_refuses_adapters_that_hold_a_part_of_the_base(tmp_path, init):
    """PEFT reads the name in any case; LoRA-GA needs gradients to begin, which do not matter here."""
    begins = init if init != "lora_ga" else True
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=begins))
    model.peft_config["default"].init_lora_weights = init
    with pytest.raises(SiftuneError, match=init.lower()):
        train(tmp_path, keeping(), model=model)
    with pytest.raises(SiftuneError, match=init.lower()):
        IST().attach(model, batches=[])


@pytest.mark.parametrize(
    ("more", "name"),
    [({"bias": "lora_only"}, "q_proj.base_layer.bias"), ({"modules_to_save": ["input_layernorm"]}, "input_layernorm")],
)
def test_refuses_weights_in_the_layers_that_are_not_suppressed(tmp_path, more, name):
    config = LoraConfig(r=2, target_modules=["q_proj"], **more)
    with pytest.raises(UnsupportedError, match=rf"{name}.* trains"):
        train(tmp_path, keeping(), model=get_peft_model(tiny("qwen2"), config))


def test_callback_without_its_rows_is_refused(tmp_path):
    saved = keeping().state()["args"]
    with pytest.raises(RecipeError, match="lost"):
        train(tmp_path, Keep(**saved))
    assert repr(Keep(**Keep(weight=2.0).state()["args"])) == repr(Keep(weight=2.0))


def test_refuses_rows_without_tokens(tmp_path):
    with pytest.raises(SiftuneError):
        train(tmp_path, Keep([]))


def test_texts_without_labels_are_refused(tmp_path):
    texts = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100], "attention_mask": [1, 1, 1]}] * 2
    with pytest.raises(DataError, match="no label tokens"):
        train(tmp_path, Keep(rows=texts), collator=Collator(0), max_steps=2)
