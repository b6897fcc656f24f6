"""Continuing token sequences of unequal lengths in one batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from siftune.models.modules import model_device


class _Report(StoppingCriteria):  # type: ignore[misc]
    """Reports each step of a generation after the prompts, and stops nothing."""

    def __init__(self, prompt: int, report: Callable[[int], None]) -> None:
        self._prompt, self._report = prompt, report

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Report the number of steps: the first new token takes none, since it follows from reading the prompts."""
        self._report(input_ids.shape[1] - self._prompt - 1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def continued(
    model: Any,
    begins: Sequence[Sequence[int]],
    settings: GenerationConfig,
    report: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Continue each beginning; the new tokens of each, including those after its end.

    Args:
        model: transformers' own model.
        begins: Token ids, at least one each; they are padded on the left.
        settings: With `pad_token_id`; they replace the model's own meanwhile, which `generate` would merge into them.
        report: Receives the number of steps since the prompts were read, from 0; one fewer than the new tokens.
    """
    longest, device = max(map(len, begins)), model_device(model)
    gaps = [longest - len(ids) for ids in begins]
    padded = [[settings.pad_token_id] * gap + [*ids] for gap, ids in zip(gaps, begins, strict=True)]
    seen = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    # TRL has mixtures of experts return the logits of their routers, of which `generate` makes no use
    asks = getattr(model.config.get_text_config(), "output_router_logits", False)
    routers = {"output_router_logits": False} if asks else {}
    own = model.generation_config
    model.generation_config = settings
    try:
        output = model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(seen, device=device),
            stopping_criteria=StoppingCriteriaList([_Report(longest, report)]),
            **routers,
        )
    finally:
        model.generation_config = own
    new: list[list[int]] = output[:, longest:].tolist()
    return new
