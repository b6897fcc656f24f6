"""What tests of offsite-tuning share: families, calibration batches, emulators in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.tiny import batch, tiny
from support.tokenizer import byte_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from siftune.offsite.emulator.curvature import Halves, LayerCurvature, Sums, SumsOfHalves, joined
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.model import Base, Split
from siftune.offsite.emulator.plan import EmulatorSettings
from siftune.offsite.emulator.record import Captured, Recording, replay
from siftune.offsite.exchange.emulate import KitOptions, emulate
from siftune.offsite.kit.folder import Kit

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "gpt_neox", "gpt2")


def base(family: str = "llama", layers: int = 5, **overrides: Any) -> PreTrainedModel:
    """A tiny base model in float64, whose biases and norms are not the zeros and ones that they begin with."""
    model = tiny(family, layers, **overrides).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def calibration(model: PreTrainedModel, count: int = 2, rows: int = 3, length: int = 9) -> list[dict[str, Tensor]]:
    """Ragged batches, all real tokens as labels."""
    found = []
    for seed in range(count):
        drawn = batch(model, rows, length, seed)
        drawn["labels"] = drawn["input_ids"].where(drawn["attention_mask"].bool(), -100)
        found.append(drawn)
    return found


def seen_by(base: Base, recording: Recording, number: int, paths: Sequence[str]) -> dict[str, Captured]:
    """What matrices of a layer saw in all batches."""
    parts: list[dict[str, Captured]] = []
    replay(base, recording, number, paths, parts.append)
    return joined(parts)


def summed(captured: dict[str, Captured], slopes: bool) -> LayerCurvature:
    """The curvature of what matrices saw."""
    sums = Sums(len(next(iter(captured.values())).x_NI), slopes)
    sums.add(captured)
    return sums.curvature()


def halved(captured: dict[str, Captured], slopes: bool) -> Halves:
    """The curvature of either half."""
    sums = SumsOfHalves(len(next(iter(captured.values())).x_NI), slopes)
    sums.add(captured)
    return sums.halves()


def settings(**values: Any) -> EmulatorSettings:
    """Settings with one outer layer at either end, and equal shares."""
    return EmulatorSettings(**{"split": Split(1, 1), "allot": "uniform", **values})


def emulator(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], **values: Any) -> PreTrainedModel:
    """An emulator in memory."""
    from siftune.offsite.emulator.assemble import materialise

    return materialise(emulators(model, batches, [settings(**values)])[0])


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits at the real tokens."""
    with torch.no_grad():
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return found[inputs["attention_mask"].bool()]


def made_kit(model: PreTrainedModel, out: Path, options: KitOptions | None = None, **values: Any) -> Kit:
    """A kit of a model, half of whose middle is kept."""
    return emulate(
        model, byte_tokenizer(), calibration(model), out, settings(keep=0.5, **values), options or KitOptions()
    )
