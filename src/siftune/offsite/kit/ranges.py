"""Ranges of the settings of a config.json, within which a model neither fails nor diverges later.

The bounds are ours, far wider than those of any real model. Types, shapes and rotary embeddings show when the model is
built and run without memory; see config.py. Here are the values for which that trial has no numbers: sizes, what a
layer divides by, and chances.
"""

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
    shown,
    whole,
)
from siftune.offsite.kit.tensors import MAX_SIZE

WORD = r"[A-Za-z0-9_.+-]{1,64}"
LAYER_KINDS = ("full_attention", "sliding_attention")  # families with two kinds have two sets of rotary settings


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


_SIZE = whole(1, MAX_SIZE)

ROTARY = (
    *("rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor"),
    *("high_freq_factor", "mscale", "mscale_all_dim", "truncate"),
)


def rotary(value: Any, where: str) -> None:
    """Rotary settings, or two sets of them by kind of layer; the numbers show in the angles, see `config.try_model`."""
    nested = isinstance(value, dict) and any(kind in value for kind in LAYER_KINDS)
    sets = as_object(value, where, (), LAYER_KINDS) if nested else {"": value}
    for kind, settings in sets.items():
        place = f"{where}.{kind}" if kind else where
        for name, setting in as_object(settings, place, (), ROTARY).items():
            _plain(setting, f"{place}.{name}")


_RULES: dict[str, Check] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "n_embd", "ffn_dim"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "n_head", "query_pre_attn_scalar"), _SIZE),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "n_inner", "word_embed_proj_dim"), null_or(_SIZE)),
    "sliding_window": null_or(_SIZE),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), whole(2, MAX_LAYERS)),
    "max_window_layers": whole(0, MAX_SIZE),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), number(1e-12, 1e-2)),
    **dict.fromkeys(("attention_dropout", "dropout", "hidden_dropout", "classifier_dropout"), _chance),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), _chance),
    "layerdrop": number(0, 0),  # layers that are skipped at random cannot be tuned one by one
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), _tokens),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), null_or(number(0.1, 1e6))),
    **dict.fromkeys(("use_bidirectional_attention", "add_cross_attention"), _forwards),
    "rope_parameters": null_or(rotary),
}


def check_range(name: str, value: Any, where: str) -> None:
    """Check the value of one setting, in JSON or in a config.

    Raises:
        KitError: A model with it would fail or blow up, or it is of another type. It names `where`, file and field.
    """
    _RULES.get(name, _plain)(value, where)


def _plain(value: Any, where: str) -> None:
    """Any other setting: a word, a number of a sane size, a truth value, or a list; the class checks its type."""
    for item in as_list(value, where, MAX_ITEMS) if isinstance(value, list) else (value,):
        if isinstance(item, str):
            _word(item, where)
        elif isinstance(item, int | float):
            number(-1e15, 1e15)(float(item), where)
        elif item is not None:
            raise KitError(f"{where} is {shown(item)}; a word, a number, true, false or null belongs there")
