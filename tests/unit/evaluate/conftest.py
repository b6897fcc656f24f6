import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB = 61


def _llama():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def _gpt2():
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


@pytest.fixture(params=[_llama, _gpt2], ids=["llama", "gpt2"])
def model(request):
    """Tiny random models in float64, one with rotary and one with learned positions, left in train mode."""
    torch.manual_seed(0)
    tiny = request.param().double()
    for parameter in tiny.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))  # far from the flat start
    return tiny.train()
