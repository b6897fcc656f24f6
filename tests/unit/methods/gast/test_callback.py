"""GAST in Trainers of transformers and TRL."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.oracles import flat, rest_scores
from support.tokenizer import byte_tokenizer
from support.trainers import Watch, adapted, arguments, rows, train, weights
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerState,
    default_data_collator,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference

from siftune import GAST, IST
from siftune.base.errors import DataError, RecipeError, UnsupportedError
from siftune.engine.groups import group_by_layer
from siftune.methods.host.callback import calling_trainer


class Batches:
    """What went into the model in training."""

    def __init__(self, model):
        self.inputs = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model, args, kwargs):
        if model.training and torch.is_grad_enabled():
            self.inputs.append({k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.ndim == 2})


def test_data_order_and_global_generators_are_left_alone(tmp_path):
    class Order(Watch):
        def __init__(self, model):
            super().__init__(model)
            self.seen = []
            model.register_forward_pre_hook(self._note, with_kwargs=True)
            self.supporting = False

        def on_step_begin(self, *_, **__):  # stands behind GAST, whose support set is drawn by then
            self.supporting = False

        def _note(self, model, args, kwargs):
            if not self.supporting:
                self.seen.append(kwargs["input_ids"].tolist())

        def on_step_end(self, *_, **__):
            self.supporting = True
            self.seen.append(torch.rand(1).item())  # what dropout would draw

        def on_train_begin(self, *_, **__):
            self.supporting = True

    seen = []
    for methods in ([], [GAST(2, "sample", support_size=3)]):
        model = adapted(dropout=0.1)
        order = Order(model)
        Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[*methods, order]).train()
        seen.append(order.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("select_until", "passes"), [(1.0, 6), (0.3, 4)])
def test_support_passes_run_in_training_mode_also_after_an_evaluation(tmp_path, select_until, passes):
    """Dropout is a part of the gradients that are compared; the Trainer begins such steps in evaluation mode."""
    model, modes = adapted(dropout=0.1).eval(), []

    def note(module, *_):
        if torch.is_grad_enabled():
            modes.append(module.training)

    model.register_forward_pre_hook(note)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    data = {"train_dataset": rows(), "eval_dataset": rows(4, seed=8)}
    method = GAST(2, "sample", support_size=3, select_until=select_until)
    Trainer(model, arguments(tmp_path, **settings), **data, callbacks=[method]).train()
    assert modes == [True] * passes  # that of the batch in every step, and a support pass while rows are selected


def test_support_rows_come_from_the_set_that_was_given(tmp_path):
    seen = []

    def spy(model, args, kwargs):
        if kwargs["input_ids"].shape[0] == 3:
            seen.extend(kwargs["input_ids"].tolist())

    support, model = rows(5, seed=9), adapted()
    model.register_forward_pre_hook(spy, with_kwargs=True)
    train(tmp_path, GAST(2, "dataset", support_size=3, support_set=support), model=model)
    assert len(seen) == 6 * 3
    assert all(row in support["input_ids"] for row in seen)
    assert len({tuple(row) for row in seen}) == 5


def test_scores_are_those_of_the_trainers_loss(tmp_path):
    """Shares of rows follow num_items_in_batch: labels of all micro-batches count."""
    dataset, model, method = rows(8), adapted(), GAST(2, "rest", keep=True)
    ragged = [row[:2] + [-100] * (i % 4) + row[2 + i % 4 :] for i, row in enumerate(dataset["labels"])]
    dataset = dataset.remove_columns("labels").add_column("labels", ragged)
    seen = Batches(model)
    start = weights(model)
    train(
        tmp_path, method, model=model, dataset=dataset, max_steps=1, gradient_accumulation_steps=2, learning_rate=1e-9
    )
    model.load_state_dict(start, strict=False)
    labels = sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs in seen.inputs)
    for inputs, choice in zip(seen.inputs[:2], method.history, strict=True):
        single = _shares(model, inputs, labels)
        for group, scores in zip(group_by_layer(model), choice.scores, strict=True):
            wanted = rest_scores(single, list(group.parameters.values()))
            torch.testing.assert_close(scores.double(), wanted, rtol=1e-4, atol=1e-9)


def _shares(model, inputs, labels):
    single = []
    for i in range(4):
        model.zero_grad()
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        logits = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[0], one["labels"][0, 1:], ignore_index=-100, reduction="sum")
        (loss / labels).backward()
        single.append({p: p.grad.clone() for p in model.parameters() if p.requires_grad})
    return {p: torch.stack([grads[p] for grads in single]) for p in single[0]}


def test_gast_before_ist_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="IST"):
        train(tmp_path, GAST(2, "rest"), IST())


def sft_rows(count=12):
    return Dataset.from_list([{"prompt": f"add {i}", "completion": f" is {i}"} for i in range(count)])


def trl_arguments(folder, kind, **settings):
    return arguments(folder, kind, bf16=False, gradient_checkpointing=False, **settings)


def test_support_rows_do_not_count_as_trained_tokens(tmp_path):
    counts = []
    for callbacks in ([], [GAST(2, "sample")]):
        model = adapted(vocab_size=300)
        trainer = SFTTrainer(
            model, trl_arguments(tmp_path, SFTConfig), train_dataset=sft_rows(), processing_class=byte_tokenizer(),
            callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
        counts.append([line["num_tokens"] for line in trainer.state.log_history if "num_tokens" in line])
    assert counts[0] == counts[1] != []


@pytest.mark.parametrize("method", [GAST(2, "sample"), IST(active=0.5, interval=2)])
def test_a_loss_function_that_divides_by_the_number_of_labels(tmp_path, method):
    """As transformers' own trainers call it; the mean is that of the model, and so are the choices."""

    def own(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    found = []
    for function in (None, own):
        model = adapted()
        trainer = Trainer(
            model, arguments(tmp_path, max_steps=4), train_dataset=rows(), compute_loss_func=function,
            callbacks=[replace(method)],
        )  # fmt: skip
        trainer.train()
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"every_n_layers": 2}])
def test_reentrant_checkpointing_has_no_support_gradient(tmp_path, more):
    model = adapted()
    model.enable_input_require_grads()
    checkpointing = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True, **more},
    }
    with pytest.raises(UnsupportedError, match="no gradient of support rows"):
        train(tmp_path, GAST(2, "sample"), model=model, **checkpointing)


@pytest.mark.parametrize("method", [GAST(2, "rest"), IST(active=0.5)])
def test_a_callback_that_joins_a_running_training(tmp_path, method):
    class Joins(TrainerCallback):
        def on_step_end(self, *_, **__):
            calling_trainer(self).add_callback(method)

    with pytest.raises(RecipeError, match="before train"):
        train(tmp_path, Joins())


@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}])
def test_packing_is_refused_before_the_first_step(tmp_path, settings):
    model = adapted(vocab_size=300)
    start = weights(model)
    trainer = SFTTrainer(
        model, trl_arguments(tmp_path, SFTConfig, **settings), train_dataset=sft_rows(),
        processing_class=byte_tokenizer(), callbacks=[GAST(2, "rest")],
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="packing"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, start[name]) for name, value in weights(model).items())


def test_a_flattening_collator_is_refused(tmp_path):
    model = adapted()
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=rows(), data_collator=DataCollatorWithFlattening(),
        callbacks=[GAST(2, "rest")],
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="DataCollatorWithFlattening"):
        trainer.train()


def preferences(count=12):
    return Dataset.from_list([{"prompt": f"add {i}", "chosen": f" is {i}", "rejected": " no"} for i in range(count)])


def test_dpo_pairs_gradients_are_those_of_single_pairs(tmp_path):
    """A batch of pairs against batches of one pair each, through the Trainer's own loss."""
    model, method = adapted(vocab_size=300), GAST(2, "rest", keep=True)
    settings = trl_arguments(tmp_path, DPOConfig, max_steps=1, learning_rate=1e-9)
    trainer = DPOTrainer(
        model, args=settings, train_dataset=preferences(4), processing_class=byte_tokenizer(), callbacks=[method]
    )
    start = weights(model)
    trainer.train()
    model.load_state_dict(start, strict=False)
    whole = next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(0)
    single = []
    for i in range(4):
        one = {k: v[[i, 4 + i]] if v.shape[0] == 8 else v[[i]] for k, v in whole.items()}
        model.zero_grad()
        (trainer.compute_loss(model, one) / 4).backward()
        single.append({p: p.grad.clone() for p in model.parameters() if p.requires_grad})
    grads = {p: torch.stack([s[p] for s in single]) for p in single[0]}
    found = method.history[0].scores.double()
    for group, scores in zip(group_by_layer(model), found, strict=True):
        rows_ = flat(grads, list(group.parameters.values()))
        wanted = rows_ @ rows_.sum(0) - rows_.square().sum(1)
        torch.testing.assert_close(scores.sort().values, wanted.sort().values, rtol=1e-3, atol=1e-9)


def test_reward_trainer_draws_pairs(tmp_path):
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj", "up_proj"])
    model = get_peft_model(LlamaForSequenceClassification(config), lora)
    method = GAST(2, "rest", keep=True)
    trainer = RewardTrainer(
        model, args=trl_arguments(tmp_path, RewardConfig), train_dataset=preferences(),
        processing_class=byte_tokenizer(), callbacks=[method],
    )  # fmt: skip
    trainer.train()
    assert all(s.scores.shape == (3, 4) for s in method.history)


def test_kto_draws_rows(tmp_path):
    method = GAST(2, "sample", keep=True)
    judged = [{"prompt": f"add {i}", "completion": f" is {i}", "label": bool(i % 2)} for i in range(12)]
    trainer = KTOTrainer(
        adapted(vocab_size=300), args=trl_arguments(tmp_path, KTOConfig), train_dataset=Dataset.from_list(judged),
        processing_class=byte_tokenizer(), callbacks=[method],
    )  # fmt: skip
    trainer.train()
    assert all(s.scores.shape == (4, 4) and s.selected.shape == (4, 2) for s in method.history)


def grpo(tmp_path, method):
    return GRPOTrainer(
        adapted(vocab_size=300), reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        args=trl_arguments(tmp_path, GRPOConfig, max_steps=2, num_generations=2, max_completion_length=6),
        train_dataset=Dataset.from_list([{"prompt": f"add {i}"} for i in range(12)]),
        processing_class=byte_tokenizer(), callbacks=[method],
    )  # fmt: skip


def test_grpo_draws_completions(tmp_path):
    method = GAST(2, "rest", keep=True)
    grpo(tmp_path, method).train()
    assert [(s.scores.shape, s.selected.shape) for s in method.history] == [((4, 4), (4, 2))] * 2


@pytest.mark.parametrize("method", [GAST(2, "sample"), IST()])
def test_grpo_has_no_rows_to_compare_with(tmp_path, method):
    trainer = grpo(tmp_path, method)
    start = weights(trainer.model)
    with pytest.raises(DataError, match="GRPO"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, start[name]) for name, value in weights(trainer.model).items())


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("DPODataCollatorWithPadding", 2),
        ("DataCollatorForVisionPreference", 2),
        ("DataCollatorForUnpairedPreference", 4),
    ],
)
def test_pairs_are_known_by_the_collator(tmp_path, name, samples):
    sift = GAST(1, "rest", keep=True)
    train(tmp_path, sift, max_steps=1, collator=collator_called(name))
    assert {choice.scores.shape for choice in sift.history} == {(4, samples)}


def test_pairs_of_dpo_are_known_by_the_trainer(tmp_path):
    inner, method = DataCollatorForPreference(pad_token_id=0), GAST(2, "rest", keep=True)
    DPOTrainer(
        adapted(vocab_size=300), args=trl_arguments(tmp_path, DPOConfig, max_steps=1), train_dataset=preferences(4),
        data_collator=lambda rows: inner(rows), processing_class=byte_tokenizer(), callbacks=[method],
    ).train()  # fmt: skip
    assert method.history[0].scores.shape == (4, 4)


def test_triples_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="DataCollatorForTriplePreference"):
        train(tmp_path, GAST(1, "rest"), collator=collator_called("DataCollatorForTriplePreference"))


def collator_called(name):
    return type(name, (), {"__call__": lambda self, features: default_data_collator(features)})()


@pytest.mark.parametrize(("pairs", "samples"), [(None, 4), (True, 2)])
def test_pairs_may_be_told(tmp_path, pairs, samples):
    sift = GAST(1, "rest", pairs=pairs, keep=True)
    train(tmp_path, sift, max_steps=2)
    assert {choice.scores.shape for choice in sift.history} == {(4, samples)}


def test_what_dataset_needs(tmp_path):
    with pytest.raises(RecipeError, match="dataset"):
        train(tmp_path, GAST(2, "dataset"))


def test_evaluation_during_training_is_not_a_batch(tmp_path):
    method, model = GAST(2, "rest", keep=True), adapted()
    trainer = Trainer(
        model, arguments(tmp_path, eval_strategy="steps", eval_steps=1), train_dataset=rows(), eval_dataset=rows(5),
        callbacks=[method],
    )  # fmt: skip
    trainer.train()
    assert [(s.step, s.batch) for s in method.history] == [(step, 0) for step in range(6)]


def test_a_restored_state_serves_once():
    loaded = []

    class Recorder:
        def load_state_dict(self, state):
            loaded.append(state["steps"])

    sift = GAST(2, "rest")
    sift._selection, sift._resumed = Recorder(), {"steps": 1}  # as the Trainer's own restoring leaves it
    saved = {"GAST": {"args": {}, "attributes": {"_resumed": {"steps": 5}}}}
    for step in (0, 1, 5):
        sift._resume(TrainerState(global_step=step, stateful_callbacks=saved))
    assert loaded == [5, 5]
    sift._resumed = {"steps": 1}
    for step in (1, 5):
        sift._resume(TrainerState(global_step=step, stateful_callbacks=saved))
    assert loaded == [5, 5, 1, 5]
