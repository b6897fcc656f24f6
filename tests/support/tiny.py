"""Tiny random causal language models of every family, and batches for them.

The weights are drawn wider than a fresh model's (0.1 instead of 0.02), so that logits and gradients differ
visibly between layers and rows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96

_DROPOUTS = ("attention_dropout", "attn_pdrop", "dropout", "embd_pdrop", "hidden_dropout", "resid_pdrop")
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_MOE = {"num_experts_per_tok": 2, "output_router_logits": False}

# family -> (model type in transformers, what its config needs beyond the common settings)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", _GROUPED),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", _GROUPED),
    "gemma2": ("gemma2", {**_GROUPED, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**_GROUPED, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", {"n_inner": 48}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gptj": ("gptj", {"rotary_dim": 4, "n_inner": 48}),
    "bloom": ("bloom", {}),
    "mixtral": ("mixtral", {**_GROUPED, **_MOE, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, **_MOE, "num_experts": 4, "moe_intermediate_size": 16}),
}
FAMILIES = tuple(_FAMILIES)

_SHARED_EXPERTS = {
    **_MOE,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# for what is tried on few families beside those above
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": ("glm4_moe", {**_GROUPED, **_SHARED_EXPERTS}),
    "deepseek_v3": ("deepseek_v3", {**_SHARED_EXPERTS, **_LATENT, "num_key_value_heads": 4}),
    "gemma3n": (  # its layers are given four copies of the hidden states
        "gemma3n_text",
        {
            **_GROUPED,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 4,
            "activation_sparsity_pattern": None,
        },
    ),
    "olmo": ("olmo", {"num_key_value_heads": 2, "clip_qkv": 0.2}),  # changes outputs of modules in place
    "mamba": ("mamba", {"state_size": 4, "time_step_rank": 4}),
    "zamba": ("zamba", {"layer_types": ["linear_attention"] * 4, "n_mamba_heads": 2, "mamba_d_state": 4}),
    "lfm2": ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2}),
    "rwkv": ("rwkv", {"attention_hidden_size": 32, "context_length": 64}),
}


def tiny(family: str, layers: int = 4, **overrides: Any) -> PreTrainedModel:
    """Build a float32 model in eval mode: hidden size 32, 4 heads, the same weights every time."""
    model_type, extra = {**_FAMILIES, **_MORE}[family]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "init_std": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **dict.fromkeys(_DROPOUTS, 0.0),
        **extra,
        **overrides,
    }
    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def batch(model: PreTrainedModel, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Draw rows of ragged length, right-padded: the first row is full, the others are down to half of it.

    Labels are -100 on padding and on a prompt of at least one token; every row keeps at least one label.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    ends = torch.randint(max(2, length // 2), length + 1, (rows, 1), generator=generator)
    ends[0] = length
    prompts = (torch.rand((rows, 1), generator=generator) * (ends - 1)).long().clamp(min=1)
    positions = torch.arange(length).expand(rows, length)
    real = positions < ends
    return {
        "input_ids": ids.where(real, 0),
        "attention_mask": real.long(),
        "labels": ids.where(real & (positions >= prompts), -100),
    }


def logits(model: nn.Module) -> Tensor:
    """Logits of the batch above."""
    with torch.no_grad():
        return model(**batch(model)).logits
