"""Numbers in tensor files: NaN, infinity and far too large ones are found wherever they stand, without a tensor."""

import hashlib
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from siftune.base.errors import KitError
from siftune.offsite.kit import tensor_file, tensors
from siftune.offsite.kit.manifest import FileSpec
from siftune.offsite.kit.tensor_file import open_tensors
from siftune.offsite.kit.tensors import METADATA


def written(path, **tensors):
    save_file(tensors, path, METADATA)
    data = path.read_bytes()
    return FileSpec(len(data), hashlib.sha256(data).hexdigest())


def check(path, spec):
    with open_tensors(path) as file:
        file.check(spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 11, 12, 99])  # first and last of all, either side of where a piece ends
def test_every_number_is_looked_at(tmp_path, monkeypatch, dtype, bad, place):
    monkeypatch.setattr(tensor_file, "_PIECE", 12 * dtype.itemsize)
    monkeypatch.setattr(tensors, "_PIECE", 11)
    sound = torch.linspace(-65504, 65504, 100).to(dtype)
    spec = written(tmp_path / "x", a=torch.ones(3, dtype=dtype), b=sound, c=torch.ones(3, dtype=dtype))
    if dtype != torch.bfloat16:  # whose rounding leads above the limit
        check(tmp_path / "x", spec)
    damaged = torch.ones(100, dtype=dtype)
    damaged[place] = bad
    spec = written(tmp_path / "x", a=torch.ones(3, dtype=dtype), b=damaged, c=torch.ones(3, dtype=dtype))
    with pytest.raises(KitError, match=r"^x: b has values that are NaN or infinite$"):
        check(tmp_path / "x", spec)


@pytest.mark.parametrize("value", [1e5, -65536.0, 3e38])
def test_numbers_whose_products_overflow_are_refused(tmp_path, value):
    spec = written(tmp_path / "x", a=torch.tensor([1.0, value]))
    with pytest.raises(KitError, match=r"^x: a has the value [0-9.e+]+; up to 65504 is allowed, on either side of 0$"):
        check(tmp_path / "x", spec)


def test_what_is_looked_at_is_what_is_hashed(tmp_path):
    spec = written(tmp_path / "x", a=torch.ones(1000), b=torch.zeros(7))
    check(tmp_path / "x", spec)
    with open_tensors(tmp_path / "x") as file:
        assert file.load(spec)["a"].sum() == 1000
    with pytest.raises(KitError, match="x has the SHA-256"):
        check(tmp_path / "x", FileSpec(spec.bytes, "0" * 64))


def test_no_tensor_is_allocated(tmp_path, monkeypatch):
    """Of 32 MB, at most a piece of one is in memory, and no tensor is larger than it."""
    spec = written(tmp_path / "x", a=torch.ones(8 << 20))
    made, empty = [], torch.empty
    monkeypatch.setattr(
        tensor_file.torch, "empty", lambda *size, **options: made.append(size) or empty(*size, **options)
    )
    seen = []
    monkeypatch.setattr(tensor_file, "check_finite", lambda piece, where: seen.append(piece.data_ptr()))
    tracemalloc.start()
    check(tmp_path / "x", spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made == [(tensor_file._PIECE,)]
    assert len(seen) == 32 << 20 >> 20
    assert len(set(seen)) == 1  # always the same memory
    assert peak < 4 << 20
