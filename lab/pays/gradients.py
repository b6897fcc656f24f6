"""Scores of a pool by gradients, as rivals of sifting by losses: LESS (arXiv 2402.04333) and centred forms of it.

The gradient of each row's loss with respect to LoRA's parameters is formed row by row, and each layer's is sketched
down to `_SIZE` numbers with random signs (ours; LESS projects to 8,192 in all). A row's score is its cosine with the
mean of the known rows' normalised gradients. In Adam's metric, a pool's row stands for the update that Adam would make
for it at this state. Centred means that the pool's mean is subtracted first (DRA, arXiv 2502.11411).

Shapes: R rows, L layers, D numbers of a layer's sketch.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from siftune.models.modules import evaluating, model_device
from siftune.sifting.choose import Floats

_SIZE = 2048

Layers = dict[int, list[Tensor]]


def gradient_scores(
    model: nn.Module, optimizer: torch.optim.Optimizer, pool: Dataset, known: Dataset
) -> dict[str, Floats]:
    """Score the rows of a pool, each (R,); low scores are those of rows like the known ones.

    Args:
        model: The model after its training on known rows.
        optimizer: The Adam of that training.
        pool: Tokens of the pool.
        known: Tokens of the known rows that it was trained on.
    """
    plain_RLD, adam_RLD = sketches(model, pool, optimizer.state)
    known_RLD, _ = sketches(model, known, {})
    return {f"gradients, {name}": value for name, value in compared(plain_RLD, known_RLD).items()} | {
        f"gradients in Adam's metric, {name}": value for name, value in compared(adam_RLD, known_RLD).items()
    }


def compared(pool_RLD: Tensor, known_RLD: Tensor) -> dict[str, Floats]:
    """Minus the cosines of rows with the known rows: of all parameters, and as means and mean ranks over layers.

    Example:
        >>> compared(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[2.0, 0.0]]]))["cosine"].tolist()
        [-1.0, -0.0]
    """
    target_LD = (known_RLD / known_RLD.flatten(1).norm(dim=1)[:, None, None]).mean(0)
    scores = {}
    for name, rows_RLD in (("", pool_RLD), (", centred", pool_RLD - pool_RLD.mean(0))):
        dots_RL, norms_RL = (rows_RLD * target_LD).sum(2), rows_RLD.norm(dim=2)
        by_layer_RL = dots_RL / (norms_RL * target_LD.norm(dim=1)).clamp_min(1e-30)
        scores |= {
            f"cosine{name}": dots_RL.sum(1) / (norms_RL.norm(dim=1) * target_LD.norm()).clamp_min(1e-30),
            f"mean of layers{name}": by_layer_RL.mean(1),
            f"ranks by layer{name}": by_layer_RL.argsort(0).argsort(0).double().mean(1),
        }
    return {name: -value.double().numpy() for name, value in scores.items()}


def sketches(model: nn.Module, data: Dataset, state: Mapping[Any, dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Sketches of the rows' gradients, and of their updates by an Adam in this state; each (R, L, D)."""
    plain, adam = [], []
    signs: dict[str, Tensor] = {}
    with evaluating(model), torch.enable_grad():
        for row in data:
            model.zero_grad()
            logits = (
                model(input_ids=torch.tensor([row["input_ids"]], device=model_device(model))).logits[0, :-1].float()
            )
            nn.functional.cross_entropy(logits, torch.tensor(row["labels"], device=logits.device)[1:]).backward()
            own, updates = Layers(), Layers()
            for name, parameter in model.named_parameters():
                if parameter.grad is None:
                    continue
                sign = signs.setdefault(name, _signs(name, parameter.numel()))
                layer = int(name.split("layers.")[1].split(".")[0])
                gradient = parameter.grad.float()
                own.setdefault(layer, []).append(_sketch(gradient, sign))
                if state:
                    updates.setdefault(layer, []).append(_sketch(_update(gradient, state[parameter]), sign))
            plain.append(_stacked(own))
            adam.append(_stacked(updates or own))
    return torch.stack(plain), torch.stack(adam)


def _signs(name: str, count: int) -> Tensor:
    """A random sign for each number of a parameter; the same in every run."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(2, (count,), generator=generator) * 2.0 - 1


def _sketch(values: Tensor, sign: Tensor) -> Tensor:
    """Sum of every `_SIZE`-th number, with its sign: inner products of sketches are right on average."""
    signed = values.flatten() * sign
    return nn.functional.pad(signed, (0, -len(signed) % _SIZE)).view(-1, _SIZE).sum(0)


def _update(gradient: Tensor, state: dict[str, Any], betas: tuple[float, float] = (0.9, 0.999)) -> Tensor:
    """The update by Adam for a gradient, without the learning rate."""
    steps = int(state["step"]) + 1
    first = betas[0] * state["exp_avg"] + (1 - betas[0]) * gradient
    second = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * gradient.square()
    return first / (1 - betas[0] ** steps) / ((second / (1 - betas[1] ** steps)).sqrt() + 1e-8)


def _stacked(layers: Layers) -> Tensor:
    return torch.stack([torch.stack(layers[layer]).sum(0) for layer in sorted(layers)])
