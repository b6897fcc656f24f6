"""Randomness of a private run: a secret key, its generators, and the draw of each step's rows.

An attacker who knows the noise can subtract it. Therefore it does not come from the recipe's seed, but from a key that
the operating system draws when training begins. The key is never written. A resumed run draws a new key, so that two
runs resumed from one checkpoint have different noise.

Every step, and every use in it, has a generator of its own, derived from the key and the step's number. On CPUs torch
uses 32 bits of a seed, which can be enumerated; there all 624 words of the generator's state come from the key.
"""

import hashlib
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

_KEY_BYTES = 32
_WORDS, _FIRST = 624, 24  # of the Mersenne twister's state, and the byte where it begins in torch's


class Secret:
    """Source of a private run's randomness; a seed is for tests only: such runs repeat and are not private."""

    def __init__(self, seed: int | None = None) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES) if seed is None else seed.to_bytes(_KEY_BYTES, "big")

    def generator(self, use: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return the generator for one use in one step, always the same."""
        stream = hashlib.shake_256(self._key + f"{use}, step {step}, {device}".encode())
        generator = torch.Generator(device)
        if generator.device.type != "cpu":
            return generator.manual_seed(int.from_bytes(stream.digest(8), "big") >> 1)
        state = generator.manual_seed(0).get_state()
        words = torch.frombuffer(bytearray(stream.digest(4 * _WORDS)), dtype=torch.uint32).to(torch.int64)
        state[_FIRST : _FIRST + 8 * _WORDS] = words.view(torch.uint8)
        return generator.set_state(state)

    def seed_dropout(self, step: int) -> None:
        """Seed torch's own generators, which draw dropout: known masks would shift with every row that is left out."""
        own = self.generator("dropout", step)
        torch.manual_seed(int(torch.randint(2**62, (), generator=own)))  # those of accelerators
        torch.set_rng_state(own.get_state())


class PoissonBatches(Sampler[list[int]]):
    """Draws each of n rows independently for each step, with probability `rate`; a step may be empty."""

    def __init__(self, rows: int, rate: float, secret: Secret) -> None:
        self._rows = rows
        self._rate = rate
        self._secret = secret
        self._epoch = 0

    def __len__(self) -> int:
        """Steps in an expected pass over the rows, the Trainer's epoch."""
        return math.ceil(1 / self._rate)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the next steps."""
        self._epoch = epoch

    def draw(self, step: int) -> list[int]:
        """Numbers of the rows of a step, ascending."""
        generator = self._secret.generator("rows", step)
        uniform = torch.rand(self._rows, generator=generator, dtype=torch.float64)
        return (uniform < self._rate).nonzero().flatten().tolist()

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * len(self)
        return map(self.draw, range(first, first + len(self)))


def collate_any(
    collate: Callable[[list[Any]], Mapping[str, Tensor]], dataset: Any, rows: list[Any]
) -> Mapping[str, Tensor]:
    """Collate rows; without rows the batch has the usual tensors of length 0."""
    return collate(rows) if rows else {name: value[:0] for name, value in collate([dataset[0]]).items()}


def parts(batch: Mapping[str, Tensor], most: int) -> Sequence[dict[str, Tensor]]:
    """Split a batch evenly into parts of at most `most` rows; an empty batch has none.

    The batch has (B, T) tensors, padded on the right as `attention_mask` says, and (B,) ones; each part is as wide as
    its longest row.
    """
    count = math.ceil(len(batch["attention_mask"]) / most)
    split = {name: value.tensor_split(count) for name, value in batch.items()} if count else {}
    return [_narrow({name: pieces[number] for name, pieces in split.items()}) for number in range(count)]


def _narrow(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    width = int(batch["attention_mask"].sum(1).max())
    return {name: value[:, :width] if value.ndim > 1 else value for name, value in batch.items()}
