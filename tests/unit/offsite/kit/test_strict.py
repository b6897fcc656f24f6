import errno
import json
import os

import pytest
from support.kits import copied

from siftune.base.errors import InputError, KitError
from siftune.offsite.kit import strict
from siftune.offsite.kit.strict import (
    as_int,
    as_list,
    as_map,
    as_object,
    as_text,
    brief,
    fresh_folder,
    list_files,
    naming,
    open_regular,
    parse_json,
    read_bytes,
    sha256_of,
    shown,
)

LIMITS = {"a.json": 10, "b.json": 10}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "folder"
    place.mkdir()
    (place / "a.json").write_bytes(b"0123456789")
    return place


def test_a_sound_folder_is_listed_with_sizes_also_through_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert list_files(folder, LIMITS) == list_files(tmp_path / "link", LIMITS) == {"a.json": 10}


@pytest.mark.parametrize("name", ["c.json", ".hidden", "A.JSON", "a.json.bak", "x\x1b[31m", "\udcff"])
def test_strange_names_are_refused_and_shown_harmlessly(folder, name):
    (folder / name).write_text("")
    with pytest.raises(KitError, match="does not belong there") as caught:
        list_files(folder, LIMITS)
    assert "\x1b" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("make", ["link", "folder", "fifo"])
def test_only_regular_files_are_listed_opened_and_read(folder, tmp_path, make):
    path = folder / "b.json"
    if make == "link":
        (tmp_path / "outside").write_text("x")
        path.symlink_to(tmp_path / "outside")
    elif make == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(KitError, match=r"b\.json is a link, a folder or a device"):
        list_files(folder, LIMITS)
    with pytest.raises(KitError, match=r"b\.json"):
        read_bytes(path, 10)
    with pytest.raises(KitError, match=r"b\.json"):
        sha256_of(path)


def test_size_limits(folder):
    with pytest.raises(KitError, match=r"a\.json has 10 bytes, more than the 9"):
        list_files(folder, {"a.json": 9})
    with pytest.raises(KitError, match=r"a\.json has more than the 9 bytes"):
        read_bytes(folder / "a.json", 9)
    assert read_bytes(folder / "a.json", 10) == b"0123456789"


@pytest.mark.parametrize("name", ["missing", "folder/a.json"])
def test_no_such_folder(folder, tmp_path, name):
    with pytest.raises(KitError, match="the folder cannot be read"):
        list_files(tmp_path / name, LIMITS)


def test_errors_while_reading_name_the_file(folder):
    with (
        pytest.raises(KitError, match=r"a\.json cannot be read \(Input/output error\)"),
        open_regular(folder / "a.json"),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_hash_is_that_of_the_whole_file(folder):
    import hashlib

    data = os.urandom(3_000_000)
    (folder / "b.json").write_bytes(data)
    assert sha256_of(folder / "b.json") == hashlib.sha256(data).hexdigest()


def test_json_comes_through_as_it_is():
    value = {"a": [1, -2, 10**30, 1.5, 1e300, True, None, "ü\ud83d\ude00"], "b": {"a": {}}}
    assert parse_json(json.dumps(value).encode(), "x") == json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not proper JSON"),
        (b"{", "not proper JSON"),
        (b'{"a": 1} x', "not proper JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"9" * 100_000, "not proper JSON"),
        (b'"\xff"', "utf-8"),
        (b"\xef\xbb\xbf{}", "not proper JSON"),
        ("{}".encode("utf-16"), "not proper JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "not proper JSON"),
        (b'{"a":' * 100_000, "not proper JSON"),
    ],
)
def test_what_is_no_json_is_refused(text, words):
    with pytest.raises(KitError, match=words) as caught:
        parse_json(text, "x.json")
    assert str(caught.value).startswith("x.json")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], 0, 11, -1, 10**30])
def test_whole_numbers(value):
    with pytest.raises(KitError, match=r"m: x is .*, not a whole number from 1 to 10"):
        as_int(value, "m: x", 1, 10)
    assert as_int(10, "m: x", 1, 10) == 10


@pytest.mark.parametrize("value", ["", "AB", "a", "abb", "ab\n", "ab\0", 5, None, ["ab"], "äb"])
def test_texts(value):
    with pytest.raises(KitError, match="m: x is"):
        as_text(value, "m: x", r"\wb")
    assert as_text("ab", "m: x", r"\wb") == "ab"


def test_objects_have_all_required_keys_and_no_others():
    assert as_object({"a": 1}, "m: x", ("a",), ("b",)) == {"a": 1}
    for value, words in (({}, "m: x has no a"), ({"a": 1, "c": 2}, "m: x has the unknown key 'c'"), ([], "not an obj")):
        with pytest.raises(KitError, match=words):
            as_object(value, "m: x", ("a",), ("b",))


def test_maps_and_lists_are_of_bounded_length():
    assert as_map({"a": 1}, "m: x", 1) == {"a": 1}
    assert as_list([1, 2], "m: x", 2) == [1, 2]
    for value in ({}, {"a": 1, "b": 2}, [], None, "a"):
        with pytest.raises(KitError, match="m: x"):
            as_map(value, "m: x", 1)
    for value in ([1, 2, 3], {}, None, "ab"):
        with pytest.raises(KitError, match="m: x"):
            as_list(value, "m: x", 2)


def test_what_strangers_wrote_is_shown_short_and_without_control_characters():
    for value in (
        "x" * 10_000,
        "\x1b[2J",
        "\udcff",
        {"a": "\n" * 1000},
        [[[[[[["x"]]]]]]],
        10**4000,
        list(range(10**5)),
    ):
        text = shown(value)
        assert len(text) < 200
        assert text.isprintable()
        text.encode()
    assert brief(ValueError("a\nb\x1b[2J" + "c" * 1000)).isprintable()
    assert len(brief(ValueError("c" * 1000))) == 200


def test_complaints_name_the_folder_and_what_to_do():
    with (
        pytest.raises(KitError, match=r"^kit here: a: b is 1; ask whoever made it for a sound copy$"),
        naming("kit here"),
    ):
        raise KitError("a: b is 1")


def test_a_fresh_folder_is_there_whole(tmp_path):
    with fresh_folder(tmp_path / "deep" / "out") as place:
        (place / "a").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "out", "a"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KitError("x"), KeyboardInterrupt()]
)
def test_or_not_at_all(tmp_path, error):
    def fill():
        with fresh_folder(tmp_path / "out") as place:
            (place / "a").write_text("x")
            raise error

    with pytest.raises(KitError if isinstance(error, Exception) else KeyboardInterrupt) as caught:
        fill()
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"{tmp_path / 'out'} cannot be written (No space left on device); free space, or give another place"
        )


def test_a_folder_in_use_stays_as_it_is(folder, tmp_path):
    before = copied(folder, tmp_path / "before")
    for place in (folder, folder / "a.json"):
        with pytest.raises(InputError), fresh_folder(place):
            pytest.fail("entered")
    assert (folder / "a.json").read_bytes() == (before / "a.json").read_bytes()
    assert [p.name for p in folder.iterdir()] == ["a.json"]


def test_links_are_not_followed_even_when_the_list_was_made_before(folder, tmp_path):
    (tmp_path / "outside").write_text("secret")
    (folder / "a.json").unlink()
    (folder / "a.json").symlink_to(tmp_path / "outside")
    with pytest.raises(KitError, match=r"a\.json cannot be read"):
        strict.read_bytes(folder / "a.json", 10)
