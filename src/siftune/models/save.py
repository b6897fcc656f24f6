"""Saving of models and tokenizers in folders that transformers 4.57 reads as well.

Transformers 5 writes names and fields that 4.57, and packages pinned to it, refuse or ignore:

    tokenizer_class        "TokenizersBackend" is unknown to 4.57; "PreTrainedTokenizerFast" works in both, and reads
                           everything else from tokenizer.json
    extra_special_tokens   a list, called additional_special_tokens in 4.57
    model_input_names      not written by 5; in 4.57 the default has token_type_ids, which `generate` refuses
    rope_parameters        4.57 reads rope_theta, rope_scaling and, by kind of layer, rope_local_base_freq. Without
                           them it uses the family's defaults, and every logit is wrong without a warning

Rotary fields of both versions are written; each version reads its own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BACKEND = "TokenizersBackend"
_FAST = "PreTrainedTokenizerFast"
_ENDLESS = 10**20  # transformers writes 1e30 if a tokenizer has no longest text
_OF_THIS_MACHINE = ("backend", "is_local", "local_files_only")
_SLIDING, _FULL = "sliding_attention", "full_attention"


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer that transformers 4.57 loads too, without fields of this machine."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in _OF_THIS_MACHINE:
        fields.pop(name, None)
    if fields.get("model_max_length", 0) > _ENDLESS:
        del fields["model_max_length"]
    if fields.get("tokenizer_class") == _BACKEND:
        fields["tokenizer_class"] = _FAST
    fields["model_input_names"] = [*tokenizer.model_input_names]
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    _write(path, fields)


def save_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model without adapter, whose rotary embeddings transformers 4.57 reads correctly."""
    model.save_pretrained(folder)
    path = Path(folder) / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.pop("_model_name_or_path", None)  # a converter's name for it
    _write(path, with_older_rope(fields))


def with_older_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Add the rotary fields of transformers 4 to those of 5, also in configs inside the config.

    Existing values of these fields stay.

    Example:
        >>> with_older_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})["rope_theta"]
        500000.0
    """
    inner = {name: with_older_rope(value) for name, value in fields.items() if name.endswith("_config") and value}
    rope = fields.get("rope_parameters") or {}
    by_kind = {kind: rope[kind] for kind in (_FULL, _SLIDING) if isinstance(rope.get(kind), Mapping)}
    return {**_older(by_kind.get(_FULL, {} if by_kind else rope), by_kind.get(_SLIDING, {})), **fields, **inner}


def _older(full: Mapping[str, Any], sliding: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of 4.57, with the base frequency of layers with a sliding window."""
    older = {name: full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = {k: v for k, v in full.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if "rope_theta" in sliding:
        older["rope_local_base_freq"] = sliding["rope_theta"]
    return older


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
