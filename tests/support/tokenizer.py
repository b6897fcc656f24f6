"""A tiny tokenizer for tests: one token per byte, with the special tokens and templates that a test needs."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|start|>", "<|end|>"]


def byte_tokenizer(
    chat_template: str | None = CHATML, add_bos: bool = False, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer.

    Args:
        chat_template: jinja text, or None for a tokenizer without one.
        add_bos: put `<|bos|>` before and `<|end|>` after every text that is encoded with special tokens.
        merges: pairs of characters that become one token where they stand side by side.
    """
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    core = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", 1), ("<|end|>", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        chat_template=chat_template,
    )
