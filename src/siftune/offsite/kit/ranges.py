"""Ranges of the settings of a config.json, within which a model neither fails nor diverges later.

The bounds are ours: far wider than any model that is known to us, and narrow enough that no square root, quotient or
power in transformers' models overflows or has no result. Whether settings fit each other and the tensors shows later,
when the model is built and run without memory; see config.py.
"""

from collections.abc import Mapping
from typing import Any

from siftune.base.errors import KitError
from siftune.offsite.kit.manifest import MAX_LAYERS
from siftune.offsite.kit.strict import (
    MAX_ITEMS,
    Check,
    as_list,
    as_object,
    as_text,
    list_of,
    null_or,
    number,
    one_of,
    shown,
    truth,
    whole,
)
from siftune.offsite.kit.tensors import MAX_SIZE

WORD = r"[A-Za-z0-9_.+-]{1,64}"
LAYER_KINDS = ("full_attention", "sliding_attention")  # families with two kinds have two sets of rotary settings
# those without weights of their own, and with a finite slope everywhere
_ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("gelu_accurate", "hardswish", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6"),
    *("sigmoid", "silu", "swish", "tanh"),
)


def _word(value: Any, where: str) -> None:
    as_text(value, where, WORD)


def _chance(value: Any, where: str) -> None:
    """A dropout: what drops everything leaves nothing to learn, and null fails in training."""
    number(0, 1)(value, where)
    if value == 1:
        raise KitError(f"{where} is {value}; it must be below 1")


def _forwards(value: Any, where: str) -> None:
    if value:
        raise KitError(f"{where} is {shown(value)}, but a kit's model reads forwards only: false or null belongs there")


def _tokens(value: Any, where: str) -> None:
    """A token's number, or several; whether the vocabulary has them is checked with the vocabulary at hand."""
    token = whole(0, MAX_SIZE)
    (list_of(token) if isinstance(value, list) else null_or(token))(value, where)


_SIZE, _CAP, _EPSILON = whole(1, MAX_SIZE), null_or(number(0.1, 1e6)), number(1e-12, 1e-2)

_ROTARY: dict[str, Check] = {
    "rope_type": one_of("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"),
    "rope_theta": number(2, 1e12),
    "partial_rotary_factor": number(1e-3, 1),
    "factor": number(1, 1e4),
    "original_max_position_embeddings": whole(2, MAX_SIZE),
    "attention_factor": number(1e-2, 1e2),
    "beta_fast": number(1e-3, 1e4),
    "beta_slow": number(1e-3, 1e4),
    "short_factor": list_of(number(1e-2, 1e4)),
    "long_factor": list_of(number(1e-2, 1e4)),
    "low_freq_factor": number(1e-3, 1e4),
    "high_freq_factor": number(1e-3, 1e4),
    "mscale": number(1e-2, 1e2),
    "mscale_all_dim": number(1e-2, 1e2),
    "truncate": truth,
}
ROTARY = tuple(_ROTARY)
_SCALED = {  # what each rope_type divides or multiplies by
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rotary(value: Any, where: str) -> None:
    """Rotary settings, or two sets of them by kind of layer."""
    nested = isinstance(value, dict) and any(kind in value for kind in LAYER_KINDS)
    as_object(value, where, (), LAYER_KINDS if nested else ROTARY)
    if nested:
        for kind, settings in value.items():
            as_object(settings, f"{where}.{kind}", (), ROTARY)
            _rotary_set(settings, f"{where}.{kind}")
    else:
        _rotary_set(value, where)


def _rotary_set(value: Mapping[str, Any], where: str) -> None:
    for name, setting in value.items():
        _ROTARY[name](setting, f"{where}.{name}")
    kind = value.get("rope_type", "default")
    for name in _SCALED.get(kind, ()):
        if name not in value:
            raise KitError(f"{where} has no {name}, which rope_type {kind} needs")
    low, high = value.get("low_freq_factor"), value.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise KitError(f"{where}: low_freq_factor is {low}, but must be below high_freq_factor, which is {high}")
    short, long = value.get("short_factor", []), value.get("long_factor", [])
    if kind == "longrope" and len(short) != len(long):
        raise KitError(f"{where}.long_factor has {len(long)} numbers, but short_factor has {len(short)}")


_RULES: dict[str, Check] = {
    **dict.fromkeys(("model_type", "dtype", "summary_type"), _word),
    "summary_activation": null_or(_word),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "n_embd", "ffn_dim", "head_dim"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "query_pre_attn_scalar"), _SIZE),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "sliding_window"), _SIZE),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), whole(2, MAX_LAYERS)),
    **dict.fromkeys(("max_window_layers", "pretraining_tp"), whole(0, MAX_SIZE)),
    **dict.fromkeys(("n_inner", "word_embed_proj_dim"), _SIZE),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), one_of(*_ACTIVATIONS)),
    **dict.fromkeys(("initializer_range", "init_std"), number(0, 10)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _EPSILON),
    **dict.fromkeys(("attention_dropout", "dropout", "hidden_dropout", "classifier_dropout"), _chance),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), _chance),
    "layerdrop": number(0, 0),  # layers that are skipped at random cannot be tuned one by one
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), _tokens),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), _CAP),
    **dict.fromkeys(("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), truth),
    **dict.fromkeys(("do_layer_norm_before", "_remove_final_layer_norm", "enable_bias"), truth),
    **dict.fromkeys(("layer_norm_elementwise_affine", "use_parallel_residual", "is_decoder"), truth),
    **dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"), truth),
    **dict.fromkeys(("summary_use_proj", "summary_proj_to_labels"), truth),
    **dict.fromkeys(("use_bidirectional_attention", "add_cross_attention"), _forwards),
    "layer_types": list_of(one_of(*LAYER_KINDS)),
    "rope_parameters": rotary,
}
_MAY_BE_NULL = (
    *("num_key_value_heads", "head_dim", "n_inner", "word_embed_proj_dim", "sliding_window", "pretraining_tp"),
    *("layer_types", "rope_parameters"),
)


def check_range(name: str, value: Any, where: str) -> None:
    """Check the value of one setting, in JSON or in a config.

    Raises:
        KitError: A model with it would fail or blow up, or it is of another type. It names `where`, file and field.
    """
    check = _RULES.get(name, _plain)
    (null_or(check) if name in _MAY_BE_NULL else check)(value, where)


def _plain(value: Any, where: str) -> None:
    """A setting that a later transformers has added: a word, a number of a sane size, a truth value, or a list."""
    for item in as_list(value, where, MAX_ITEMS) if isinstance(value, list) else (value,):
        if isinstance(item, str):
            _word(item, where)
        elif isinstance(item, int | float):
            number(-1e15, 1e15)(float(item), where)
        elif item is not None:
            raise KitError(f"{where} is {shown(item)}; a word, a number, true, false or null belongs there")
