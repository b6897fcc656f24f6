"""Cache of tokens: its key, and damaged or unwritable folders."""

import os
from dataclasses import replace

import pytest
from support.tokenizer import byte_tokenizer

from siftune.data import cache as token_cache
from siftune.data.cache import cached_tokens
from siftune.data.rows import rows_from
from siftune.data.tokens import Form

FORM = Form(byte_tokenizer(), 40)
RECORDS = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "x" * 90, "completion": "y"},
    {"prompt": "2+2=", "completion": "4"},
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "_FROM", 1)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def made(monkeypatch):
    """Counts how often rows are tokenised."""
    calls = []

    def counting(*args):
        calls.append(args)
        return original(*args)

    original = token_cache.tokens_of
    monkeypatch.setattr(token_cache, "tokens_of", counting)
    return calls


def rows(records=RECORDS, name="a.jsonl:"):
    return rows_from(records, name)


def columns(found):
    return {name: found.data[name][:] for name in found.data.column_names}


def test_tokens_are_cached_independently_of_the_file(cache, made):
    first, again = cached_tokens(rows(), FORM), cached_tokens(rows(name="b.jsonl:"), FORM)
    assert len(made) == 1
    assert columns(first) == columns(again)
    assert (first.bad, first.cut, first.notes) == (again.bad, again.cut, again.notes)
    assert str(again.faults(rows(name="b.jsonl:"))[0]).startswith("b.jsonl: 2: the prompt takes")
    assert [path.name for path in cache.iterdir()] == [path.name for path in cache.iterdir() if len(path.name) == 32]


@pytest.mark.parametrize(
    "change",
    [
        lambda form: (rows(RECORDS[:2]), form),
        lambda form: (rows(RECORDS[::-1]), form),
        lambda form: (rows([{**RECORDS[0], "prompt": "1+1"}, *RECORDS[1:]]), form),
        lambda form: (rows([{**RECORDS[0], "completion": "3"}, *RECORDS[1:]]), form),
        lambda form: (rows(), replace(form, max_length=41)),
        lambda form: (rows(), replace(form, template="none")),
        lambda form: (rows(), replace(form, completion_only=False)),
        lambda form: (rows(), replace(form, tokenizer=byte_tokenizer(add_bos=True))),
        lambda form: (rows(), replace(form, tokenizer=byte_tokenizer(form.tokenizer.chat_template + " "))),
        lambda form: (rows(), replace(form, tokenizer=byte_tokenizer(merges=(("1", "+"),)))),
    ],
)  # fmt: skip
def test_everything_that_determines_tokens_is_in_the_key(cache, made, change):
    cached_tokens(rows(), FORM)
    given, form = change(FORM)
    found = cached_tokens(given, form)
    assert len(made) == 2
    assert columns(found) == columns(token_cache.tokens_of(given, form))


def test_a_template_that_writes_the_date_is_of_a_day(cache, made, monkeypatch):
    dated = replace(FORM, tokenizer=byte_tokenizer("{{ strftime_now('%d') }}" + FORM.tokenizer.chat_template))
    cached_tokens(rows(), dated)

    class Tomorrow:
        @staticmethod
        def today():
            return "2000-01-01"

    monkeypatch.setattr(token_cache, "date", Tomorrow)
    cached_tokens(rows(), FORM)
    cached_tokens(rows(), dated)
    assert len(made) == 3


def damages():
    def shorten(folder):
        path = folder / "tokens.arrow"
        path.write_bytes(path.read_bytes()[:-40])

    def flip(folder):
        path = folder / "tokens.arrow"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return {
        "shortened": shorten,
        "a bit": flip,
        "about.json": lambda folder: (folder / "about.json").write_text("{"),
        "a list": lambda folder: (folder / "about.json").write_text("[]"),
        "no key": lambda folder: (folder / "about.json").write_text("{}"),
        "gone": lambda folder: (folder / "tokens.arrow").unlink(),
    }


@pytest.mark.parametrize("kind", damages())
def test_a_damaged_folder_is_replaced(cache, made, caplog, kind):
    first = columns(cached_tokens(rows(), FORM))
    [folder] = cache.iterdir()
    damages()[kind](folder)
    assert columns(cached_tokens(rows(), FORM)) == first
    assert len(made) == 2
    assert "damaged" in caplog.text
    cached_tokens(rows(), FORM)
    assert len(made) == 2


def test_a_cache_that_cannot_be_written_is_no_reason_not_to_train(tmp_path, monkeypatch, made, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(token_cache, "_FROM", 1)
    assert len(cached_tokens(rows(), FORM).data) == 2
    assert "tokens are not cached" in caplog.text


def test_others_on_the_machine_cannot_read_them(cache):
    cached_tokens(rows(), FORM)
    [folder] = cache.iterdir()
    assert folder.stat().st_mode & 0o077 == 0


def test_few_rows_are_not_cached(cache, monkeypatch):
    monkeypatch.setattr(token_cache, "_FROM", 4)
    assert len(cached_tokens(rows(), FORM).data) == 2
    assert not cache.exists()
    cached_tokens(rows([*RECORDS, RECORDS[0]]), FORM)
    assert len([*cache.iterdir()]) == 1


def test_an_unidentifiable_tokenizer_is_not_cached(cache):
    class Unknown:
        def __getattr__(self, name):
            if name == "backend_tokenizer":
                raise AttributeError(name)
            return getattr(FORM.tokenizer, name)

        def __call__(self, *args, **options):
            return FORM.tokenizer(*args, **options)

    assert len(cached_tokens(rows(), replace(FORM, tokenizer=Unknown())).data) == 2
    assert not cache.exists()


def test_the_least_recently_used_folder_is_removed(cache, made, monkeypatch):
    """Three sets of equal size where two fit: the first, which was used again, outlives the second."""
    sets = [rows([{**RECORDS[0], "completion": digit}]) for digit in "123"]
    for number, given in enumerate(sets[:2]):
        cached_tokens(given, FORM)
        newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    size = sum(path.stat().st_size for path in newest.rglob("*"))
    monkeypatch.setattr(token_cache, "_MOST", int(2.5 * size))
    cached_tokens(sets[0], FORM)
    cached_tokens(sets[2], FORM)
    assert len(made) == 3
    assert len([*cache.iterdir()]) == 2
    cached_tokens(sets[2], FORM)
    cached_tokens(sets[0], FORM)
    assert len(made) == 3
    cached_tokens(sets[1], FORM)
    assert len(made) == 4
