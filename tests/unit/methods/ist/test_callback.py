"""IST and RST in Trainers of transformers and TRL, and in plain loops."""

import copy
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.seen import assert_same
from support.tiny import batch, tiny
from support.tokenizer import byte_tokenizer
from support.trainers import Watch, adapted, arguments, rows, train, weights
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from siftune import GAST, IST
from siftune.base.errors import AdapterError, RecipeError, UnsupportedError
from siftune.engine.groups import group_by_layer
from siftune.methods.host.callback import _metrics_unchanged


def layers_of(names):
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


class Choices:
    """Collects the choices of a callback."""

    def __init__(self, method):
        self.all = []
        method.on_select = self.all.append


def watch_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch))


def test_importance_is_scored_every_interval_but_not_at_the_start(tmp_path):
    method = IST(interval=2, score_batch_size=6, candidates=2)
    chosen = Choices(method).all
    train(tmp_path, method)
    assert [c.step for c in chosen if c.losses] == [2, 4]
    for choice in chosen:
        if choice.losses:
            assert len(choice.losses) == 2
            assert sum(choice.rewards) == pytest.approx(0, abs=1e-12)
    assert not torch.equal(method.importance, torch.zeros(4, dtype=torch.float64))


def test_scores_are_losses_with_damped_adapters(tmp_path):
    """The losses behind the importance, computed again by hand from the recorded sets and rows."""
    method = IST(active=1.0, interval=3, score_batch_size=24)
    chosen = Choices(method).all
    dataset = rows()
    model = adapted()
    by_hand = {}

    class AtScoring(Watch):
        def on_step_begin(self, args, state, control, **_):  # stands before IST, so it sees the model that IST scores
            if state.global_step == 3:
                by_hand["weights"] = weights(self.model)

    worker = Trainer(
        model, arguments(tmp_path, max_steps=4), train_dataset=dataset, callbacks=[AtScoring(model), method]
    )
    worker.train()
    model.load_state_dict(by_hand["weights"], strict=False)
    model.eval()
    (choice,) = [c for c in chosen if c.losses]
    inputs = {k: torch.tensor(dataset[k]) for k in ("input_ids", "attention_mask", "labels")}  # all rows, in any order
    for layers, loss in zip(choice.suppressed, choice.losses, strict=True):
        scales = [(m, dict(m.scaling)) for m in _lora_modules(model, layers)]
        for module, scale in scales:
            module.scaling = {k: v * 0.25 for k, v in scale.items()}
        with torch.no_grad():
            assert float(model(**inputs).loss) == pytest.approx(loss, abs=1e-5)
        for module, scale in scales:
            module.scaling = scale


def _lora_modules(model, layers):
    return [m for g in group_by_layer(model) if g.index in layers for m in g.module.modules() if hasattr(m, "lora_A")]


def test_small_batches_score_in_chunks_with_the_same_loss(tmp_path):
    losses = []
    for size in (1, 24):
        method = IST(active=1.0, interval=1, score_batch_size=24)
        chosen = Choices(method).all
        train(tmp_path, method, max_steps=2, learning_rate=0.0, per_device_train_batch_size=size)
        losses.append(next(c for c in chosen if c.losses).losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"fsdp": True}, "fsdp"),
        ({"_n_gpu": 2}, "nn.DataParallel"),
    ],
)
@pytest.mark.parametrize("method", [IST, GAST])
def test_sharded_and_copied_models_are_refused(tmp_path, method, bad, message):
    settings = arguments(tmp_path)
    settings.__dict__.update(bad)
    with pytest.raises(UnsupportedError, match=message):
        method().on_train_begin(settings, None, None, model=adapted())


def test_scoring_keeps_the_metrics_that_were_there():
    before = {"train": {"loss": [1.0]}, "eval": {"entropy": [2.0]}}
    for name in ("_metrics", "_stored_metrics"):
        metrics = defaultdict(lambda: defaultdict(list))
        metrics.update({mode: defaultdict(list, copy.deepcopy(values)) for mode, values in before.items()})
        with _metrics_unchanged(SimpleNamespace(**{name: metrics})):
            metrics["eval"]["entropy"].append(9.0)
            metrics["eval"]["new"].append(9.0)
            metrics["test"]["new"].append(9.0)
        assert {mode: values for mode, values in metrics.items() if values} == before


def test_dpo_trainer_scores_with_its_own_loss(tmp_path):
    tokenizer = byte_tokenizer()
    data = Dataset.from_list([{"prompt": f"add {i}", "chosen": f" is {i}", "rejected": " no"} for i in range(12)])
    method = IST(active=0.5, interval=2, score_batch_size=4)
    chosen = Choices(method).all
    model = adapted(vocab_size=300)
    settings = arguments(tmp_path, DPOConfig, bf16=False, gradient_checkpointing=False, learning_rate=1e-4)
    trainer = DPOTrainer(
        model, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[Watch(model), method]
    )
    trainer.train()
    for choice, grads in zip(chosen, watch_of(trainer).with_grad, strict=True):
        assert layers_of(grads) == set(choice.layers)
    assert not trainer._metrics["eval"]  # scoring runs in evaluation mode, and leaves no metrics of it
    losses = [loss for c in chosen for loss in c.losses]
    assert len(losses) == 6
    assert all(0.3 < loss < 1.5 for loss in losses)  # −log σ(margin), log 2 at the start; cross entropy would be ~5


def test_attach_follows_the_optimizer():
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    data = batch(model)
    with IST(active=0.5, interval=2, seed=5).attach(model, batches=[data], optimizer=optimizer) as sift:
        for step in range(5):
            layers, before = set(sift.last.layers), weights(model)
            assert sift.last.step == step
            model(**data).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # the gates still keep Adam off inactive layers
            after = weights(model)
            assert layers_of(n for n in after if not torch.equal(after[n], before[n])) == layers
        assert any(sift.importance != 0)
    steps = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    assert steps == (0, 0)


def test_attach_without_rows_is_refused():
    with pytest.raises(RecipeError, match="batches"):
        IST().attach(adapted())


def test_scoring_does_not_change_training(tmp_path):
    methods = ([], [IST(active=1.0, interval=2)])
    plain, ours = (train(tmp_path, *m, model=adapted(dropout=0.2), max_steps=12)[0] for m in methods)
    assert_same(weights(plain), weights(ours))


def test_resume_of_an_iterable_continues_its_position(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from rows().with_format("torch")

    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "dataset": Stream()}
    whole, resumed = (IST(active=0.5, interval=2, score_batch_size=5) for _ in range(2))
    first, second = Choices(whole).all, Choices(resumed).all
    train(tmp_path, whole, **settings)
    train(tmp_path, resumed, resume=str(tmp_path / "checkpoint-5"), **settings)
    assert [c.losses for c in second] == [c.losses for c in first[5:]]


@pytest.mark.parametrize(
    "made",
    [
        lambda: tiny("llama"),
        lambda: get_peft_model(
            tiny("llama"),
            LoraConfig(layers_to_transform=[1], target_modules=["q_proj"], modules_to_save=["input_layernorm"]),
        ),
    ],
    ids=["no adapter", "not in each layer"],
)
def test_layers_that_cannot_be_scored_are_refused_before_a_step(tmp_path, made):
    steps = []
    choices = IST(active=0.5, interval=50, on_select=steps.append)
    with pytest.raises(AdapterError, match=r"no PEFT adapter"):
        train(tmp_path, choices, model=made())
    assert steps == []


def test_adapters_whose_modules_take_arguments_of_their_own(tmp_path):
    """aLoRA's, which base layers do not know."""
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, alora_invocation_tokens=[5], target_modules=["q_proj"]))
    method = IST(active=0.5, interval=2, score_batch_size=4)
    losses = []
    method.on_select = lambda choice: losses.extend(choice.losses)
    train(tmp_path, method, model=model)
    assert losses
