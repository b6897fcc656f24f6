from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.kits import tensor_specs

from siftune.base.errors import KitError
from siftune.offsite.kit import tensors
from siftune.offsite.kit.tensors import (
    DTYPES,
    TensorSpec,
    check_specs,
    open_tensors,
    parse_spec,
    spec_of,
    write_tensors,
)

shapes = st.lists(st.integers(1, 5), max_size=4)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_.0-9]{1,12}", fullmatch=True), st.tuples(shapes, st.sampled_from([*DTYPES])), min_size=1
    )
)
@settings(max_examples=30, deadline=None)
def test_headers_are_read_as_the_library_reads_them(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    write_tensors(path, {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, (shape, dtype) in wanted.items()})
    specs = tensor_specs(path)
    assert specs == {name: TensorSpec(tuple(shape), dtype) for name, (shape, dtype) in wanted.items()}
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert spec_of(tensor) == specs[name]
            assert specs[name].bytes == tensor.numel() * tensor.element_size()


def test_files_are_those_of_the_library_bit_for_bit(tmp_path):
    drawn = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    parts = {"b.w": drawn.bfloat16(), "z": drawn, "c": drawn[0].half(), "a.b": drawn[:, :1].contiguous()}
    write_tensors(tmp_path / "ours", parts)
    save_file(parts, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_values_come_through_also_of_views(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "x", {"t": base.T, "row": torch.ones(2, 3)[1:], "p": torch.nn.Parameter(torch.ones(1))})
    with safe_open(tmp_path / "x", "pt") as file:
        assert torch.equal(file.get_tensor("t"), base.T)
    assert (tmp_path / "x").stat().st_size < 600  # the views' hidden rows are not in it


@pytest.fixture
def path(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "x", {"format": "pt"})
    return tmp_path / "x"


DAMAGE = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:20],
    "cut in a tensor": lambda data: data[:-1],
    "bytes behind the tensors": lambda data: data + b"x",
    "a header that claims to be long": lambda data: (10**12).to_bytes(8, "little") + data[8:],
    "another shape": lambda data: data.replace(b"[2,3]", b"[2,4]"),
    "no JSON": lambda data: data.replace(b"{", b"["),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused_by_name(path, kind):
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(KitError, match=r"^x cannot be read as safetensors"):
        tensor_specs(path)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_what_is_no_file_is_refused_by_name(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(KitError, match=r"^x cannot be read as safetensors"):
        tensor_specs(tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 10, 11, 99])  # first and last of all, either side of where a piece ends
def test_every_number_is_looked_at(tmp_path, monkeypatch, dtype, bad, place):
    monkeypatch.setattr(tensors, "_PIECE", 11)
    numbers = torch.linspace(-65504, 65504, 100).to(dtype)
    if dtype != torch.bfloat16:  # whose rounding leads above the limit
        check(tmp_path / "x", numbers)
    numbers = torch.ones(100, dtype=dtype)
    numbers[place] = bad
    with pytest.raises(KitError, match=r"^x: b has values that are NaN or infinite$"):
        check(tmp_path / "x", numbers)


@pytest.mark.parametrize("value", [1e5, -65536.0, 3e38])
def test_numbers_whose_products_overflow_are_refused(tmp_path, value):
    with pytest.raises(KitError, match=r"^x: b has the value [0-9.e+]+; up to 65504 is allowed, on either side of 0$"):
        check(tmp_path / "x", torch.tensor([1.0, value]))


def check(path, numbers):
    one = torch.ones(3, dtype=numbers.dtype)
    save_file({"a": one, "b": numbers, "c": one.clone()}, path)
    with open_tensors(path) as file:
        file.check_numbers()


def test_specs_in_json():
    assert parse_spec({"shape": [2, 3], "dtype": "F16"}, "m: a") == TensorSpec((2, 3), "F16")
    assert parse_spec({"shape": [], "dtype": "F16"}, "m: a") == TensorSpec((), "F16")
    for value in ({"shape": [2]}, {"shape": 2, "dtype": "F32"}, {"shape": [2], "dtype": "I64"}, [], None):
        with pytest.raises(KitError, match="m: a"):
            parse_spec(value, "m: a")


def test_differences_are_named():
    a, b = TensorSpec((2, 3), "F32"), TensorSpec((3, 2), "F32")
    check_specs({"x": a, "y": b}, {"y": b, "x": a}, "f", "m")
    for found, words in (
        ({"x": a}, "^f has no tensor 'y', which m has$"),
        ({"x": a, "y": b, "z": a}, "^f has a tensor 'z', which m lacks$"),
        ({"x": a, "y": a}, r"^f: y is F32 \[2, 3\], but m says F32 \[3, 2\]$"),
        ({"x": a, "y": TensorSpec((3, 2), "F16")}, r"^f: y is F16 \[3, 2\], but m says F32 \[3, 2\]$"),
    ):
        with pytest.raises(KitError, match=words):
            check_specs(found, {"x": a, "y": b}, "f", "m")


def test_others_can_read_what_is_to_be_handed_out(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_not_written(tmp_path, value, dtype):
    tensor = torch.zeros(5, dtype=dtype)
    tensor[3] = value
    with pytest.raises(KitError, match="x: t has values that are NaN or infinite"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(1), "t": tensor})
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_written_is_refused_in_words(tmp_path):
    with pytest.raises(KitError, match="x cannot be written"):
        write_tensors(tmp_path / "no" / "x", {"a": torch.zeros(3)})
    with pytest.raises(KitError, match=r"torch\.float64"):
        spec_of(torch.zeros(1, dtype=torch.float64))
    assert tensors.spec_of(torch.zeros(1, 2)) == TensorSpec((1, 2), "F32")
