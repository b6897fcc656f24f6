"""Matrices of a decoder layer, and the factor of its norms, in one table for all families.

Paths are relative to the decoder layer. Fused projections (gpt2's and GPT-NeoX's query, key and value) count as one
matrix. MLP channels are rows of every matrix in `reads` and columns of `writes`.
"""

from dataclasses import dataclass, replace
from typing import Any

from siftune.base.errors import UnsupportedError


@dataclass(frozen=True)
class Family:
    """Matrices of a decoder layer, by path."""

    attention: tuple[str, ...]  # the projections of attention
    reads: tuple[str, ...]  # MLP matrices that read the hidden state, one row per channel
    writes: str  # the MLP matrix that writes to it, one column per channel
    centred_norms: bool = False  # its norms multiply by 1 + weight, not by the weight

    @property
    def matrices(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.attention, *self.reads, self.writes)


_LLAMA = Family(
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    reads=("mlp.gate_proj", "mlp.up_proj"),
    writes="mlp.down_proj",
)

# transformers' model type -> its matrices
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), replace(_LLAMA, centred_norms=True)),
    "opt": Family(
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        reads=("fc1",),
        writes="fc2",
    ),
    "gpt_neox": Family(
        attention=("attention.query_key_value", "attention.dense"),
        reads=("mlp.dense_h_to_4h",),
        writes="mlp.dense_4h_to_h",
    ),
    "gpt2": Family(attention=("attn.c_attn", "attn.c_proj"), reads=("mlp.c_fc",), writes="mlp.c_proj"),
}


def family_of(config: Any) -> Family:
    """Look up a model's family, by its transformers config.

    Raises:
        UnsupportedError: The family is not in the table.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"models of type {kind!r} cannot be compressed: the places of their matrices are unknown; "
            f"known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]
