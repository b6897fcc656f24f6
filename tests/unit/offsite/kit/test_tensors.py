import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.kits import header_of, tensor_specs, write_header
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from siftune.base.errors import KitError
from siftune.offsite.kit import tensors
from siftune.offsite.kit.tensors import (
    DTYPES,
    MAX_HEADER,
    MAX_SIZE,
    TensorSpec,
    check_specs,
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


def test_one_tensor_is_asked_for_at_a_time(tmp_path):
    """Lazy tensors are let go of before the next one comes."""
    alive: list[StorageWeakRef] = []

    class Lazy(dict[str, Tensor]):
        def __getitem__(self, name):
            tensor = torch.ones(4)
            assert all(one.expired() for one in alive)
            alive.append(StorageWeakRef(tensor.untyped_storage()))
            return tensor

    write_tensors(tmp_path / "x", Lazy.fromkeys("abc"))
    assert len(alive) == 6


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


def changed(change):
    """Damage of a parsed header."""

    def apply(header):
        return change(header) or header

    return apply


def put(name, field, value):
    return changed(lambda h: h[name].update({field: value}))


DAMAGE = {
    "no metadata": (changed(lambda h: h.pop("__metadata__") and None), "__metadata__"),
    "more metadata": (put("__metadata__", "author", "me"), "__metadata__"),
    "no tensor": (changed(lambda h: {"__metadata__": h["__metadata__"]}), "leave gaps|has 0|do not end"),
    "not an object": (changed(lambda h: [h]), "begin with a brace"),
    "bad name": (changed(lambda h: h | {"../a": h.pop("a")}), "name of a tensor"),
    "long name": (changed(lambda h: h | {"a" * 201: h.pop("a")}), "name of a tensor"),
    "no dtype": (changed(lambda h: h["a"].pop("dtype") and None), r"header\.a has no dtype"),
    "more keys": (put("a", "code", "x"), r"header\.a has the unknown key 'code'"),
    "F64": (put("a", "dtype", "F64"), r"header\.a\.dtype"),
    "dtype of a list": (put("a", "dtype", ["F32"]), r"header\.a\.dtype"),
    "true rows": (put("a", "shape", [True, 6]), r"header\.a\.shape"),
    "no rows": (put("a", "shape", [0, 3]), r"header\.a\.shape"),
    "negative": (put("a", "shape", [-2, -3]), r"header\.a\.shape"),
    "10^9 rows": (put("a", "shape", [10**9, 3]), r"header\.a\.shape is 1000000000"),
    "float rows": (put("a", "shape", [2.0, 3]), r"header\.a\.shape"),
    "many dims": (put("a", "shape", [1, 1, 1, 2, 3]), r"header\.a\.shape has 5 items"),
    "huge but in bounds": (put("a", "shape", [MAX_SIZE, MAX_SIZE]), r"header\.a\.data_offsets span 24 bytes"),
    "other shape": (put("a", "shape", [2, 4]), r"header\.a\.data_offsets span 24 bytes"),
    "one offset": (put("a", "data_offsets", [0]), r"header\.a\.data_offsets"),
    "three offsets": (put("a", "data_offsets", [0, 24, 32]), r"header\.a\.data_offsets"),
    "far offsets": (put("a", "data_offsets", [10**12, 10**12 + 24]), r"header\.a\.data_offsets"),
    "backwards": (put("a", "data_offsets", [24, 0]), r"header\.a\.data_offsets"),
    "overlap": (put("b", "data_offsets", [0, 8]), "leave gaps, overlap"),
    "gap": (changed(lambda h: h.pop("b") and None), "leave gaps, overlap"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_headers_are_refused(path, kind):
    change, words = DAMAGE[kind]
    header, data = header_of(path)
    write_header(path, change(header), data)
    with pytest.raises(KitError, match=words) as caught:
        tensor_specs(path)
    assert str(caught.value).startswith("x: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "length of its header is 0"),
        (b"\x02\0\0", "length of its header"),
        ((10**12).to_bytes(8, "little") + b"{}", "length of its header is 1000000000000; .* 2 to 2$"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "length of its header is 18446744073709551615"),
        ((1).to_bytes(8, "little") + b"{}", "length of its header is 1;"),
        ((3).to_bytes(8, "little") + b"{}", "length of its header is 3;"),
        ((2).to_bytes(8, "little") + b"{}", "it must be an object with 1 to"),
        ((3).to_bytes(8, "little") + b" {}", "begin with a brace"),
        ((4).to_bytes(8, "little") + b"{]]]", "not proper JSON"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(KitError, match=words):
        tensor_specs(tmp_path / "x")


def test_a_long_header_is_not_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(10 * MAX_HEADER)
    with pytest.raises(KitError, match="length of its header"):
        tensor_specs(tmp_path / "x")


def test_a_name_that_stands_twice_is_refused(path):
    header, data = header_of(path)
    text = json.dumps(header)
    write_header(path, text.replace('"b":', '"a":').encode(), data)
    with pytest.raises(KitError, match="the key 'a' occurs twice"):
        tensor_specs(path)


def test_bytes_behind_the_tensors_are_refused(path):
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(KitError, match="do not end where the file does"):
        tensor_specs(path)


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
