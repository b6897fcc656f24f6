"""Losses over label positions: the model's own, logits under a mask, and cross entropy against torch's in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.tiny import FAMILIES, batch, tiny
from torch import nn
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from siftune.base.errors import AdapterError, LayerError
from siftune.models import loss
from siftune.models.loss import (
    IGNORED,
    by_row,
    contiguous_head_input,
    cross_entropy,
    difference_from_model,
    find_output_embeddings,
    label_positions,
    logits_at,
    next_labels,
    row_losses,
    token_loss,
    token_losses,
)


def label_loss(model, inputs, items=None):
    with logits_at(model, label_positions(inputs["labels"])):
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return token_loss(logits, inputs["labels"], items)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, **tolerance):
    assert set(ours) == set(theirs)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_model(family):
    model = tiny(family, layers=2)
    if family in ("mixtral", "qwen3_moe"):
        model.set_experts_implementation("eager")  # the others have no float64
    model.double()
    inputs = batch(model)
    ours, theirs = label_loss(model, inputs), model(**inputs).loss
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=1e-6)
    assert_same(gradients(model, ours), gradients(model, theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_given_number_of_items_is_the_divisor(family):
    model = tiny(family, layers=2)
    inputs = batch(model)
    theirs = model(**inputs, num_items_in_batch=50)
    for items in (50, torch.tensor(50)):
        torch.testing.assert_close(label_loss(model, inputs, items), theirs.loss)
    assert not torch.isclose(theirs.loss, label_loss(model, inputs), rtol=0.1)


@pytest.mark.parametrize("items", [None, 0, 3, torch.tensor(0), torch.tensor(3)])
def test_without_any_label_the_loss_is_zero(items):
    model = tiny("llama", layers=2)
    inputs = batch(model)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    loss = label_loss(model, inputs, items)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in gradients(model, loss).values())


def test_the_first_token_is_never_predicted():
    labels = torch.tensor([[5, IGNORED, 6, 7], [8, IGNORED, IGNORED, 9], [4, IGNORED, IGNORED, IGNORED]])
    assert label_positions(labels).nonzero().tolist() == [[0, 1], [0, 2], [1, 2]]
    assert next_labels(labels).tolist() == [6, 7, 9]


def test_the_comparison_takes_the_row_with_most_labels():
    model = tiny("llama", layers=2)
    inputs = batch(model, rows=4)
    row = int((inputs["labels"] != IGNORED).sum(1).argmax())
    with torch.no_grad():
        ours, theirs = difference_from_model(model, inputs)
        alone = float(model(**{name: value[row : row + 1] for name, value in inputs.items()}).loss)
    assert ours == pytest.approx(alone, rel=1e-5)
    assert theirs == pytest.approx(alone, rel=1e-5)


SIZES = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1)


def gemma2():
    # soft-capping after the head: small cap, so that leaving it out would show
    config = Gemma2Config(
        **SIZES, num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.2
    )
    return Gemma2ForCausalLM(config)


def wrapped(**options):
    return get_peft_model(
        LlamaForCausalLM(LLAMA), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    )


MODELS = {
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "gemma2": gemma2,
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=2)),
    "lora": lambda: wrapped(target_modules=["q_proj"]),
    "lora on the head": lambda: wrapped(target_modules=["q_proj", "lm_head"]),
    "saved head": lambda: wrapped(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.fixture
def ids_and_mask():
    ids = torch.arange(15).view(3, 5)
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    return ids, mask


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    if name == "saved head":
        head = find_output_embeddings(model)
        nn.init.normal_(head.modules_to_save["default"].weight)  # differs from the original
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_under_the_mask(name, ids_and_mask):
    ids, mask = ids_and_mask
    model = build(name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    full = model(input_ids=ids).logits[mask]
    wanted = torch.autograd.grad(full.square().sum(), parameters, allow_unused=True)
    with logits_at(model, mask):
        some = model(input_ids=ids).logits
    assert some.shape == (1, 4, 37)
    torch.testing.assert_close(some[0], full, rtol=0, atol=1e-12)
    found = torch.autograd.grad(some.square().sum(), parameters, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_finds_the_head_behind_a_wrapper(ids_and_mask):
    model = build("llama")
    assert find_output_embeddings(nn.DataParallel(model)) is model.lm_head


def test_hook_is_gone_afterwards_even_after_an_error(ids_and_mask):
    ids, mask = ids_and_mask
    model = build("llama")
    with logits_at(model, mask):
        model(input_ids=ids)
    with pytest.raises(RuntimeError, match="boom"), logits_at(model, mask):
        raise RuntimeError("boom")
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=ids).logits.shape == (3, 5, 37)


def test_a_model_without_a_head():
    with pytest.raises(LayerError, match="LlamaModel has no output embeddings"):
        find_output_embeddings(LlamaModel(LLAMA))
    with pytest.raises(LayerError, match="Linear has no output embeddings"):
        find_output_embeddings(nn.Linear(2, 2))


def test_virtual_tokens_are_refused(ids_and_mask):
    ids, mask = ids_and_mask
    model = get_peft_model(LlamaForCausalLM(LLAMA), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match="virtual tokens"), logits_at(model, mask):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool)])
def test_a_mask_of_the_wrong_kind(mask):
    with pytest.raises(ValueError, match="mask must be bool"), logits_at(build("llama"), mask):
        pass


def test_the_head_is_given_contiguous_hidden_states_inside_the_block_only(ids_and_mask):
    model = LlamaForCausalLM(LLAMA).eval()
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].is_contiguous()))
    with torch.no_grad():
        plain = model(input_ids=ids_and_mask[0], logits_to_keep=1).logits
        with contiguous_head_input(model):
            packed = model(input_ids=ids_and_mask[0], logits_to_keep=1).logits
        model(input_ids=ids_and_mask[0], logits_to_keep=1)
    assert seen == [False, True, False]
    torch.testing.assert_close(packed, plain)


@pytest.mark.parametrize("calls", [0, 2])
def test_one_pass_per_block(ids_and_mask, calls):
    ids, mask = ids_and_mask
    model = build("llama")
    with pytest.raises(LayerError, match=f"{calls} times"), logits_at(model, mask):  # noqa: PT012
        for _ in range(calls):
            model(input_ids=ids)


def both(logits, targets, towards):
    """Losses and gradients: ours, and torch's in float64 of the same numbers."""
    found = []
    for function, dtype in ((cross_entropy, logits.dtype), (functional.cross_entropy, torch.float64)):
        leaf = logits.to(dtype).requires_grad_()
        losses = function(leaf, targets) if function is cross_entropy else function(leaf, targets, reduction="none")
        (gradient,) = torch.autograd.grad(losses, leaf, towards.to(losses.dtype))
        found.append((losses.detach(), gradient))
    return found


@settings(deadline=None, max_examples=40)
@given(
    labels=st.integers(0, 9), vocabulary=st.integers(1, 12), at_a_time=st.integers(1, 60),
    scale=st.sampled_from([1, 30]), seed=st.integers(0, 99),
)  # fmt: skip
def test_losses_and_gradients_are_torchs_however_many_labels_go_at_a_time(labels, vocabulary, at_a_time, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(labels, vocabulary, generator=generator) * scale
    targets = torch.randint(vocabulary, (labels,), generator=generator)
    towards = torch.randn(labels, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_AT_A_TIME", {"cpu": at_a_time})
        (losses, gradient), (wanted, wanted_gradient) = both(logits, targets, towards)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=2e-6)


def test_in_float64_nothing_is_rounded():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ours, theirs in zip(*both(logits, torch.arange(7), torch.ones(7)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_only_the_gradient_is_rounded(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 300, generator=generator) * 3).to(dtype)
    targets = torch.randint(300, (7,), generator=generator)
    (losses, gradient), (wanted, wanted_gradient) = both(logits, targets, torch.full((7,), 0.25))
    assert (losses.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient.to(dtype), rtol=1e-2, atol=1e-7)


def test_a_token_that_cannot_come_has_no_gradient_and_as_a_label_an_endless_loss():
    logits = torch.tensor([[0.0, -math.inf, 1.0], [0.0, -math.inf, 1.0]])
    (losses, gradient), (wanted, _) = both(logits, torch.tensor([2, 1]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(losses.double(), wanted)
    assert losses[1] == math.inf
    assert gradient[0, 1] == 0


def test_a_common_offset_of_logits_costs_no_digits():
    logits = torch.randint(0, 64, (5, 9), generator=torch.Generator().manual_seed(0)) / 8 + 10_000
    (losses, gradient), (wanted, wanted_gradient) = both(logits, torch.arange(5), torch.ones(5))
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=1e-6)


def test_memory_is_of_a_few_labels_at_a_time():
    sizes = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
                sizes.append(found.numel())
            return found

    logits = torch.randn(64, 2**16).bfloat16().requires_grad_()
    with Watched():
        cross_entropy(logits, torch.zeros(64, dtype=torch.int64)).sum().backward()
    assert max(sizes) == 2**18  # of 2**22


def test_rows_have_the_means_of_their_labels():
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([[5, 1, 2, 9], [-100, -100, -100, -100], [7, -100, 3, -100]])
    own = functional.cross_entropy(logits[0], torch.tensor([1, 2, 9, 3]), reduction="none")
    first, last = own[:3].mean(), own[3]
    torch.testing.assert_close(row_losses(logits, labels), torch.stack([first, torch.zeros_like(first), last]))
    means, counts = by_row(token_losses(logits, labels), labels)
    torch.testing.assert_close(means, torch.stack([first, first * math.nan, last]).float(), equal_nan=True)
    assert counts.tolist() == [3, 0, 1]


def test_half_precision_is_widened():
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    losses = row_losses(logits, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, row_losses(logits.double(), labels).float())
