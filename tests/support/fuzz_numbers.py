"""Settings and tensors of which each is legal, and which ruin the model."""

import json

import torch
from support.damage import dump
from support.fuzz_forged import EMULATOR, OUTER, Forger

LARGEST = 65504.0

_RUINOUS = {
    "llama": {
        "rms_norm_eps": (1e-12, 1e-2), "attention_dropout": (0.5, 0.999999), "initializer_range": (0, 10),
        "hidden_act": ("relu2", "relu6", "linear", "sigmoid", "tanh", "hardswish", "gelu_10", "mish", "leaky_relu"),
        "attention_bias": (True,), "mlp_bias": (True,), "pretraining_tp": (0, 2, 7), "tie_word_embeddings": (True,),
        "max_position_embeddings": (1, 2, 64, 10**8), "bos_token_id": (319, 0, None), "eos_token_id": (0, 319, [1, 2]),
        "pad_token_id": (0, 3, None, 319), "use_cache": (False,),
        "rope_parameters": (
            {"rope_type": "default", "rope_theta": 2}, {"rope_type": "default", "rope_theta": 1e12},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e4},
            {"rope_type": "dynamic", "rope_theta": 2, "factor": 1e4},
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1},
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 1e4, "original_max_position_embeddings": 2},
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4, "original_max_position_embeddings": 64,
             "attention_factor": 100},
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4, "original_max_position_embeddings": 64,
             "beta_fast": 1e-3, "beta_slow": 1e4},
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4, "original_max_position_embeddings": 64,
             "mscale": 100, "mscale_all_dim": 0.01},
            {"rope_type": "llama3", "rope_theta": 1e4, "factor": 1e4, "original_max_position_embeddings": 2,
             "low_freq_factor": 1e-3, "high_freq_factor": 1e4},
            {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1e-2] * 4, "long_factor": [1e4] * 4,
             "original_max_position_embeddings": 2},
        ),
    },
    "mistral": {"sliding_window": (1, 2, 10**8), "attention_dropout": (0.9999,), "hidden_act": ("relu2",)},
    "qwen2": {"use_sliding_window": (True,), "sliding_window": (1, None), "max_window_layers": (0, 10**8)},
    "qwen3": {"attention_bias": (True,), "rms_norm_eps": (1e-12,), "hidden_act": ("relu2", "linear")},
    "gemma2": {
        "final_logit_softcapping": (0.1, 1e6, None), "attn_logit_softcapping": (0.1, 1e6, None),
        "query_pre_attn_scalar": (1, 10**8), "sliding_window": (1, 2), "hidden_activation": ("relu2", "sigmoid"),
    },
    "gemma3_text": {
        "query_pre_attn_scalar": (1, 10**8), "sliding_window": (1, 2), "use_bidirectional_attention": (True, False),
        "final_logit_softcapping": (0.1, 1e6), "attn_logit_softcapping": (0.1,),
    },
    "gpt2": {
        "resid_pdrop": (0.999999,), "embd_pdrop": (0.999999,), "attn_pdrop": (0.999999,),
        "scale_attn_weights": (False,),
        "scale_attn_by_inverse_layer_idx": (True,), "reorder_and_upcast_attn": (True,),
        "layer_norm_epsilon": (1e-12, 1e-2),
        "activation_function": ("relu2", "linear", "relu"),
    },
    "gpt_neox": {
        "use_parallel_residual": (False,), "hidden_dropout": (0.999999,), "layer_norm_eps": (1e-12, 1e-2),
        "hidden_act": ("relu2", "gelu_10"), "is_decoder": (True, False),
    },
    "opt": {
        "do_layer_norm_before": (False,), "_remove_final_layer_norm": (True,),
        "layer_norm_elementwise_affine": (False,),
        "enable_bias": (False,), "activation_function": ("relu2", "gelu"), "dropout": (0.999999,), "init_std": (10,),
    },
}  # fmt: skip


def ruinous(sound, subjects):
    """Legal values of settings: (subject, what, files)."""
    for subject, table in _RUINOUS.items():
        if subject not in subjects:
            continue
        whole = json.loads((sound / subject / "config.json").read_bytes())
        for name, choices in table.items():
            for value in choices:
                if whole.get(name, "") != value:
                    yield subject, f"{name} = {value}", {"config.json": dump({**whole, name: value})}


def _set(name, change):
    """A change of all tensors of a file whose name ends so."""

    def apply(forger, end):
        for key, tensor in forger.tensors[name].items():
            if key.endswith(end):
                forger.tensors[name][key] = change(tensor.clone())

    return apply


def _ones(value):
    return lambda tensor: torch.full_like(tensor, value)


def _alternating(tensor):
    flat = torch.full((tensor.numel(),), LARGEST, dtype=tensor.dtype)
    flat[1::2] *= -1
    return flat.reshape(tensor.shape)


def _row(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


def _one(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


_TENSORS = {  # file, end of names, change
    **{f"embeddings {value:g}": (EMULATOR, "embed_tokens.weight", _ones(value)) for value in (0.0, LARGEST, 1e-38)},
    **{f"head {value:g}": (EMULATOR, "lm_head.weight", _ones(value)) for value in (0.0, LARGEST, -LARGEST)},
    **{f"embedding of {t} {v:g}": (EMULATOR, "embed_tokens.weight", _row(t, v))
       for t in (0, 3, 72, 89) for v in (0.0, LARGEST)},
    **{f"head of {t} {v:g}": (EMULATOR, "lm_head.weight", _row(t, v)) for t in (3, 72) for v in (LARGEST, -LARGEST)},
    **{f"{end} of the middle {v:g}": (EMULATOR, f"{end}.weight", _ones(v))
       for end in ("norm", "layernorm", "q_proj", "down_proj") for v in (0.0, LARGEST, 1e-45)},
    **{f"{end} to tune {v:g}": (OUTER, f"{end}.weight", _ones(v))
       for end in ("layernorm", "q_proj", "v_proj", "down_proj", "up_proj") for v in (0.0, LARGEST, 1e-45)},
    **{f"{name} alternates": (name, "weight", _alternating) for name in (EMULATOR, OUTER)},
    **{f"{name}: one number {v:g}": (name, "weight", _one(v))
       for name in (EMULATOR, OUTER) for v in (LARGEST, -LARGEST, 1e-45, -0.0)},
    "up alternates": (OUTER, "up_proj.weight", _alternating),
    "equal rows": (OUTER, "q_proj.weight", lambda tensor: tensor[:1].expand_as(tensor).clone()),
    "reversed": (OUTER, "o_proj.weight", lambda tensor: tensor.flip(0)),
    "negated": (EMULATOR, "embed_tokens.weight", lambda tensor: -tensor),
}  # fmt: skip


def extremes(sound, generator, subjects):
    """Legal numbers, some with an activation that squares them: (subject, what, files)."""
    for subject in subjects:
        for what, (name, end, change) in _TENSORS.items():
            other = Forger(sound / subject, generator)
            _set(name, change)(other, end)
            yield subject, what, other.files()
            if subject == "llama" and ("embedding of" in what or "alternates" in what):
                other.config["hidden_act"] = "relu2"
                yield subject, f"{what}, squared", other.files()
