"""Random llamas for measurements, of any depth and of any size, also larger than memory."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_llama(folder: Path, layers: int, hidden: int, longest: int, spread: float = 0.02) -> str:
    """Save a random llama with a tokenizer of single bytes.

    Args:
        folder: Where to.
        layers: Its decoder layers.
        hidden: Its hidden size, a multiple of 4.
        longest: Largest number of tokens in a row.
        spread: Deviation of its weights; with the usual one no training of adapters moves its losses far.

    Returns:
        The folder.
    """
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=longest, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=spread,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    _save_tokenizer(folder)
    return str(folder)


def save_sharded_llama(folder: Path, layers: int, hidden: int, intermediate: int) -> str:
    """Save a random llama in bfloat16, a shard for each decoder layer; one of them is in memory at a time.

    Args:
        folder: Where to; made.
        layers: Its decoder layers.
        hidden: Its hidden size, a multiple of 128, the size of a head.
        intermediate: Channels of its MLPs.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, max_position_embeddings=2048, dtype="bfloat16", pad_token_id=0,
        bos_token_id=1, eos_token_id=1, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    _save_tokenizer(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    index, size = {}, 0
    for number, names in enumerate(_shards(shapes, layers)):
        file, generator = f"model-{number:05d}.safetensors", torch.Generator().manual_seed(number)
        shard = {name: _random(shapes[name], generator) for name in names}
        save_file(shard, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
        size += sum(2 * tensor.numel() for tensor in shard.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return str(folder)


def _shards(shapes: dict[str, torch.Size], layers: int) -> Iterator[list[str]]:
    yield [name for name in shapes if ".layers." not in name]
    for number in range(layers):
        yield [name for name in shapes if f".layers.{number}." in name]


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A weight as of a fresh model; a norm's is one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def _save_tokenizer(folder: Path) -> None:
    letters = ["<|pad|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(BPE(vocab={token: number for number, token in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
