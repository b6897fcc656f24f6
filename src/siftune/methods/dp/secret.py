"""Randomness of a private run: a secret key, and the streams of numbers that it yields.

An attacker who can compute the noise can subtract it, and the gain by drawing rows assumes that the draw is secret. So
neither comes from the recipe's seed or from torch's generators, but from a key that the operating system draws when
training begins. The key is never written. A resumed run draws a new key, so that two runs resumed from one checkpoint
have different noise.

Every use in every step has a stream of its own: AES-256 in counter mode, under a key that BLAKE2b derives from the
secret one, the use and the step. Opacus, with `secure_mode`, takes noise and rows from such a generator, too.
"""

import hashlib
import math
import secrets

import torch
from torch import Tensor

from siftune.base.errors import RecipeError

_KEY_BYTES = 32
_BITS = 53  # of a uniform number, as many as float64 holds
_AT_A_TIME = 2**18  # normal numbers: 2 MB in float64, which stay in a processor's cache
_WORDS, _FIRST = 624, 24  # of the Mersenne twister's state, and the byte where it begins in torch's


class Stream:
    """Random numbers of one key, which must not be used again."""

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise RecipeError(
                "differential privacy needs the package cryptography, for its noise; install it with: pip install "
                "'siftune[dp]'"
            ) from error
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def take(self, count: int) -> bytearray:
        """The next bytes."""
        return bytearray(self._cipher.update(bytes(count)))

    def uniform(self, count: int) -> Tensor:
        """The next numbers, (count,) float64: multiples of 2⁻⁵³ in [0, 1), all with the same probability."""
        bits = torch.frombuffer(self.take(8 * count), dtype=torch.int64)
        return bits.bitwise_and_(2**_BITS - 1).double().mul_(2.0**-_BITS)

    def normal(self, count: int) -> Tensor:
        """The next independent standard normal numbers, (count,) float64, at most 8.6 in size; by Box and Muller."""
        drawn = torch.empty(count, dtype=torch.float64)
        for part in torch.split(drawn, _AT_A_TIME):
            uniform = self.uniform(len(part) + len(part) % 2)
            radius, angle = uniform.neg_().add_(1).chunk(2)  # in (0, 1], as log 0 is −∞
            radius.log_().mul_(-2).sqrt_()
            angle.mul_(2 * math.pi)
            part.copy_(torch.cat([radius * angle.cos(), radius * angle.sin()])[: len(part)])
        return drawn


class Secret:
    """Source of a private run's randomness; a seed is for tests only: such runs repeat and are not private."""

    def __init__(self, seed: int | None = None) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES) if seed is None else seed.to_bytes(_KEY_BYTES, "big")

    def stream(self, use: str, step: int) -> Stream:
        """Return the stream for one use in one step, always the same."""
        label = f"{use}, step {step}".encode()
        return Stream(hashlib.blake2b(label, key=self._key, digest_size=_KEY_BYTES).digest())

    def seed_dropout(self, step: int) -> None:
        """Seed torch's own generators, which draw dropout: known masks would shift with every row that is left out.

        On CPUs torch uses 32 bits of a seed, which can be enumerated; there the complete state comes from the key.
        """
        stream = self.stream("dropout", step)
        torch.manual_seed(int.from_bytes(stream.take(8), "big") >> 1)  # also those of accelerators
        words = torch.frombuffer(stream.take(4 * _WORDS), dtype=torch.uint32).to(torch.int64)
        state = torch.get_rng_state()
        state[_FIRST : _FIRST + 8 * _WORDS] = words.view(torch.uint8)
        torch.set_rng_state(state)
