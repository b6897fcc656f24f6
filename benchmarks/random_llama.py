"""A random llama of any depth, to measure on."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_llama(folder: Path, layers: int, hidden: int, longest: int) -> str:
    """Save a random llama with a tokenizer of single bytes.

    Args:
        folder: Where to.
        layers: Its decoder layers.
        hidden: Its hidden size, a multiple of 4.
        longest: Tokens that a row may have.

    Returns:
        The folder.
    """
    letters = ["<|pad|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(BPE(vocab={token: number for number, token in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=longest, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
