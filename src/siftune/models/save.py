"""Folders that other versions of transformers read as well.

Transformers 5 writes names and fields that 4.57, and what is pinned to it, refuses or passes over:

    tokenizer_class        "TokenizersBackend", which 4.57 does not know; "PreTrainedTokenizerFast", which both know,
                           takes all that it needs from tokenizer.json
    extra_special_tokens   a list, which 4.57 calls additional_special_tokens
    rope_parameters        4.57 looks for rope_theta, rope_scaling and, by kind of layer, rope_local_base_freq: without
                           them it takes the family's defaults, and every logit is wrong without a word

Rotary fields are written beside those of 5, which goes by its own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BACKEND = "TokenizersBackend"
_FAST = "PreTrainedTokenizerFast"
_ENDLESS = 10**20  # transformers writes 1e30 where a tokenizer knows of no longest text
_OF_THIS_MACHINE = ("backend", "is_local", "local_files_only")
_SLIDING, _FULL = "sliding_attention", "full_attention"


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer, so that transformers 4.57 loads it too; fields that say nothing of it are left out."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in _OF_THIS_MACHINE:
        fields.pop(name, None)
    if fields.get("model_max_length", 0) > _ENDLESS:
        del fields["model_max_length"]
    if fields.get("tokenizer_class") == _BACKEND:
        fields["tokenizer_class"] = _FAST
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    _write(path, fields)


def save_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model, without an adapter, so that transformers 4.57 reads its rotary embeddings as they are."""
    model.save_pretrained(folder)
    path = Path(folder) / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.pop("_model_name_or_path", None)  # what a converter called it
    _write(path, with_older_rope(fields))


def with_older_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config's fields with the rotary embeddings of transformers 4 beside those of 5, in configs inside of it, too.

    Its own values of the fields that are added stay.

    Example:
        >>> with_older_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})["rope_theta"]
        500000.0
    """
    inner = {name: with_older_rope(value) for name, value in fields.items() if name.endswith("_config") and value}
    rope = fields.get("rope_parameters") or {}
    by_kind = {kind: rope[kind] for kind in (_FULL, _SLIDING) if isinstance(rope.get(kind), Mapping)}
    return {**_older(by_kind.get(_FULL, {} if by_kind else rope), by_kind.get(_SLIDING, {})), **fields, **inner}


def _older(full: Mapping[str, Any], sliding: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of 4.57: of layers with full attention, and the base frequency of those with a sliding window."""
    found = {name: full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    if full.get("rope_type", "default") != "default":
        found["rope_scaling"] = {k: v for k, v in full.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if "rope_theta" in sliding:
        found["rope_local_base_freq"] = sliding["rope_theta"]
    return found


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
