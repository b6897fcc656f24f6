"""Texts that a model writes itself, by sampling at temperature 1."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import GenerationConfig

from siftune.base.errors import UnsupportedError
from siftune.base.files import Progress
from siftune.data.batches import by_length
from siftune.models.generate import continued
from siftune.models.loss import IGNORED, contiguous_head_input
from siftune.models.modules import evaluating, model_device, own_randomness

_AT_A_TIME = 64  # texts

TokenRow = dict[str, list[int]]


def sample_texts(
    model: Any,
    count: int,
    length: int,
    seed: int,
    prompts: Sequence[Sequence[int]] = (),
    progress: Progress | None = None,
    least: int = 1,
) -> list[TokenRow]:
    """Sample texts of a causal language model.

    Args:
        model: transformers' own model, in which adapters may be suppressed; its mode is restored.
        count: Number of texts.
        length: Tokens of a text, with its prompt or first token, at most; but see `least`.
        seed: Seed; torch's own generators are restored.
        prompts: Token ids of prompts that begin the first texts, one text each; the others begin with the model's
            first token.
        progress: Receives the number of sampled texts; those of a batch count by their share of the tokens.
        least: Tokens that may follow a prompt, however long it is.

    Returns:
        Rows with `input_ids` and `labels`: all tokens after the first, or after the prompt.

    Raises:
        UnsupportedError: The model's config has no first token.
    """
    begins = [list(ids) for ids in prompts] + [[first_token(model)] for _ in range(count - len(prompts))]
    rooms = [max(least if place < len(prompts) else 1, length - len(ids)) for place, ids in enumerate(begins)]
    texts: dict[int, list[int]] = {}
    with evaluating(model), contiguous_head_input(model), own_randomness(model_device(model), seed):
        for places in by_length([len(ids) for ids in begins], _AT_A_TIME):
            room = [rooms[place] for place in places]

            def report(steps: int, done: int = len(texts), here: int = len(places), most: int = max(room)) -> None:
                if progress is not None:
                    progress("sampling texts", done + here * steps // most, count)

            report(0)
            found = _continued(model, [begins[place] for place in places], room, report)
            texts |= zip(places, found, strict=True)
            report(max(room))
    return [
        {"input_ids": texts[place], "labels": [IGNORED] * len(begin) + texts[place][len(begin) :]}
        for place, begin in enumerate(begins)
    ]


def first_token(model: Any) -> int:
    """The token that begins a text."""
    for config in (model.generation_config, model.config.get_text_config()):
        for name in ("bos_token_id", "eos_token_id"):
            ids = getattr(config, name, None)
            if ids is not None:
                return int(ids[0] if isinstance(ids, list) else ids)
    raise UnsupportedError(
        f"the config of {type(model).__name__} names no first token, so the model cannot write texts of its own: give "
        "texts as rows"
    )


def _continued(
    model: Any, begins: Sequence[list[int]], rooms: Sequence[int], report: Callable[[int], None]
) -> list[list[int]]:
    """Continue each beginning up to a token that ends a text, or by as many tokens as it has room for."""
    ends = _end_tokens(model)
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max(rooms), pad_token_id=0, eos_token_id=ends or None
    )
    texts = []
    for begin, room, new in zip(begins, rooms, continued(model, begins, settings, report), strict=True):
        stops = [place for place, token in enumerate(new) if token in ends]
        texts.append(begin + new[: min(room, stops[0] + 1 if stops else room)])
    return texts


def _end_tokens(model: Any) -> list[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
