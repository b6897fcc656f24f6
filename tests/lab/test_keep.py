"""The laboratory's rivals of the divergence: against loops in float64, and as recipes."""

import pytest
import torch
from peft import OFTConfig
from support.adapted import shake
from support.oracles import summed_loss
from support.tiny import batch, tiny
from support.tokenizer import byte_tokenizer

from lab.keep.arms import Elastic, fisher_ratios, orthogonal_adapters, train_best_half
from lab.keep.job import KeepWork
from lab.keep.run import METHODS
from lab.training import recipe_of
from siftune.data.batches import Collator
from siftune.models.adapters.attach import attach_adapter


def rows_of(seed):
    one = batch(tiny("llama"), 5, seed=seed)
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(one["input_ids"], one["labels"], strict=True)]


TASK, TEXTS = rows_of(1), rows_of(2)


def start():
    return attach_adapter(tiny("llama"), rank=4, alpha=6).double()


def gradients_of(model, rows, names):
    """A backward pass for each row; {name: gradient} of each."""
    for row in rows:
        model.zero_grad()
        summed_loss(model, Collator(0)([row]), divisor=1).backward()
        yield {name: p.grad.clone() for name, p in model.named_parameters() if name.endswith(names)}


def test_elastic_weights_are_those_of_a_loop():
    model, base = start(), tiny("llama").double()
    before = [p.requires_grad for p in model.parameters()]
    penalty = Elastic(model, [Collator(0)([row]) for row in TEXTS])
    assert [p.requires_grad for p in model.parameters()] == before
    assert penalty(0) == 0
    shake(model)
    tokens = sum(label != -100 for row in TEXTS for label in row["labels"])
    expected = 0.0
    for gradients in gradients_of(base, TEXTS, ("proj.weight",)):
        for name, gradient in gradients.items():
            pair = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
            change = 6 / 4 * pair.lora_B["default"].weight @ pair.lora_A["default"].weight
            expected = expected + (gradient**2 * change**2).sum() / (2 * tokens)
    torch.testing.assert_close(penalty(1).double(), expected, rtol=1e-5, atol=0)
    penalty.add_gradient(0, 2.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, gradient in zip(trained, torch.autograd.grad(2 * expected, trained), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def test_gate_ranks_layers_as_a_loop():
    model = start()
    ratios_L = fisher_ratios(model, TASK, TEXTS)
    expected = []
    for layer in range(4):
        names = tuple(n for n, _ in model.named_parameters() if f"layers.{layer}." in n and "lora_B" in n)
        task, texts = (
            [torch.cat([g.flatten() for g in found.values()]) for found in gradients_of(model, rows, names)]
            for rows in (TASK, TEXTS)
        )
        mean = torch.stack(task).mean(0)
        fisher_DD = sum(torch.outer(text, text) for text in texts) / len(texts)
        expected.append(mean @ mean / (mean @ fisher_DD @ mean))
    torch.testing.assert_close(ratios_L.double(), torch.stack(expected), rtol=1e-4, atol=0)
    best = sorted(range(4), key=lambda layer: -expected[layer])[:2]
    assert train_best_half(model, ratios_L) == sorted(best)
    trained = {int(n.split("layers.")[1][0]) for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {*best}


def test_orthogonal_adapters_end_with_their_block():
    with orthogonal_adapters():
        model = attach_adapter(tiny("llama"))
    config = model.peft_config["default"]
    assert isinstance(config, OFTConfig)
    assert "q_proj" in config.target_modules
    one = batch(tiny("llama"))
    inputs = {name: one[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**inputs).logits, tiny("llama")(**inputs).logits)  # it starts as the base
    assert attach_adapter(tiny("llama")).peft_config["default"].peft_type == "LORA"


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_recipes(name, tmp_path):
    job = {"batch": 4, "lr": 1e-3, "seed": 0, "steps": 3, "model": "smollm2", "method": METHODS[name]}
    layers = recipe_of(job, tmp_path).layers
    assert layers == {"fixed": tuple(range(3, 28)), "upper": tuple(range(7, 30))}.get(name)


def test_task_texts_are_completions_of_training_rows():
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "1 + 1 =", "completion": "2"}, {"prompt": "2 + 3 =", "completion": "5"}]
    texts = KeepWork({}, None, tokenizer, None, None)._texts("task", None, rows)
    answers = [tokenizer.decode([i for i in row["labels"] if i != -100]) for row in texts]
    assert [answer[:2] for answer in answers] == [" 2", " 5"]
