"""Secret numbers: their distribution, and their independence of everything but the key, the use and the step."""

import builtins
import math

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from scipy.stats import kstest, norm

from siftune.base.errors import RecipeError
from siftune.methods.dp.secret import Secret, Stream

COUNT = 200_001  # not even, and more than a part


def test_bytes_are_the_ciphers():
    """AES-GCM encrypts in counter mode, from the counter 2 on after a nonce of 12 zeros."""
    key = bytes(range(32))
    ours = Stream(key)
    assert ours.take(32) + ours.take(64) == Stream(key).take(96)
    assert Stream(key).take(96)[32:] == AESGCM(key).encrypt(bytes(12), bytes(64), None)[:64]


def test_uniform_numbers_have_53_bits_each():
    drawn = Stream(bytes(32)).uniform(COUNT)
    units = drawn * 2.0**53
    assert drawn.dtype == torch.float64
    assert torch.equal(units, units.round())
    assert 0 <= float(drawn.min()) < float(drawn.max()) < 1
    assert kstest(drawn.numpy(), "uniform").pvalue > 0.001
    bits = torch.stack([(units.long() >> shift) & 1 for shift in range(53)]).double()
    assert float((torch.corrcoef(bits) - torch.eye(53)).abs().max()) < 5.5 / math.sqrt(COUNT)


def test_normal_numbers_have_the_distribution_and_no_relation():
    drawn = Stream(bytes(32)).normal(COUNT)
    assert drawn.shape == (COUNT,)
    assert kstest(drawn.numpy(), "norm").pvalue > 0.001
    for size in (2.0, 3.0, 4.0):
        wanted = 2 * norm.sf(size) * COUNT
        assert abs(float((drawn.abs() > size).sum()) - wanted) < 4 * math.sqrt(wanted)
    half = COUNT // 2
    for other in (drawn[half:-1], drawn[1 : half + 1]):  # the other of a pair, and the next one
        for power in (1, 2):
            pair = torch.stack([drawn[:half].pow(power), other.pow(power)])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 4.5 / math.sqrt(half)


@pytest.mark.parametrize("least", [True, False])
def test_the_ends_of_the_uniform_numbers_are_finite(monkeypatch, least):
    monkeypatch.setattr(Stream, "take", lambda self, count: bytearray((b"\0" if least else b"\xff") * count))
    drawn = Stream(bytes(32)).normal(2)
    assert drawn.isfinite().all()
    assert float(drawn.norm()) == pytest.approx(0 if least else math.sqrt(2 * 53 * math.log(2)))


def test_streams_repeat_for_one_use_and_step_and_differ_otherwise():
    def drawn(secret, use="noise", step=0):
        return secret.stream(use, step).normal(1000)

    streams = [
        drawn(Secret(0)), drawn(Secret(1)), drawn(Secret(0), "rows"), drawn(Secret(0), step=1), drawn(Secret(1 << 200)),
        drawn(Secret()), drawn(Secret()),
    ]  # fmt: skip
    assert torch.equal(streams[0], drawn(Secret(0)))
    correlations = torch.corrcoef(torch.stack(streams))[~torch.eye(len(streams), dtype=torch.bool)]
    assert float(correlations.abs().max()) < 5 / math.sqrt(1000)


def test_all_of_the_dropout_generators_state_is_secret():
    """torch would take 32 bits of a seed: then the state's first word tells all others."""
    with torch.random.fork_rng(devices=[]):
        states = []
        for seed in (0, 1):
            Secret(seed).seed_dropout(0)
            states.append(torch.get_rng_state()[24 : 24 + 8 * 624].view(torch.int64).clone())
        one, other = states
        seeded = torch.Generator().manual_seed(int(one[0])).get_state()[24 : 24 + 8 * 624].view(torch.int64)
    assert int((one == other).sum()) == 0
    assert int((one == seeded).sum()) == 1
    assert int(one.min()) >= 0
    assert int(one.max()) < 2**32
    bits = torch.stack([(one >> shift) & 1 for shift in range(32)]).double()
    assert float((bits.mean(1) - 0.5).abs().max()) < 4.5 * 0.5 / math.sqrt(624)


def test_without_cryptography_one_sentence_says_what_to_install(monkeypatch):
    def missing(name, *args, **kwargs):
        if name.startswith("cryptography"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RecipeError, match="cryptography"):
        Secret().stream("noise", 0)
