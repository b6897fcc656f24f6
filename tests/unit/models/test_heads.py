import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
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
from siftune.models.loss import contiguous_head_input, find_output_embeddings, logits_at

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
def batch():
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
def test_logits_and_gradients_are_those_under_the_mask(name, batch):
    ids, mask = batch
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


def test_finds_the_head_behind_a_wrapper(batch):
    model = build("llama")
    assert find_output_embeddings(nn.DataParallel(model)) is model.lm_head


def test_hook_is_gone_afterwards_even_after_an_error(batch):
    ids, mask = batch
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


def test_a_head_that_is_never_called(batch):
    with pytest.raises(LayerError, match="called 0 times"), logits_at(build("llama"), batch[1]):
        pass


def test_two_passes_in_one_block(batch):
    ids, mask = batch
    model = build("llama")

    def twice():
        with logits_at(model, mask):
            model(input_ids=ids)
            model(input_ids=ids)

    with pytest.raises(LayerError, match="called 2 times"):
        twice()


def test_hidden_states_of_another_shape(batch):
    ids, mask = batch
    model = build("llama")
    with pytest.raises(AdapterError, match=r"\(3, 5, 16\).*\(3, 4\)"), logits_at(model, mask[:, :4]):
        model(input_ids=ids)
    assert not model.lm_head._forward_pre_hooks


def test_virtual_tokens_are_refused(batch):
    ids, mask = batch
    model = get_peft_model(LlamaForCausalLM(LLAMA), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match="virtual tokens"), logits_at(model, mask):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool)])
def test_a_mask_of_the_wrong_kind(mask):
    with pytest.raises(ValueError, match="mask must be bool"), logits_at(build("llama"), mask):
        pass


def test_the_head_is_given_contiguous_hidden_states_inside_the_block_only(batch):
    model = LlamaForCausalLM(LLAMA).eval()
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].is_contiguous()))
    with torch.no_grad():
        plain = model(input_ids=batch[0], logits_to_keep=1).logits
        with contiguous_head_input(model):
            packed = model(input_ids=batch[0], logits_to_keep=1).logits
        model(input_ids=batch[0], logits_to_keep=1)
    assert seen == [False, True, False]
    torch.testing.assert_close(packed, plain)
