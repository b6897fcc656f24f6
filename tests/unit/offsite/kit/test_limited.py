"""Children that die of memory, of time or by a signal, and the parent lives: with the checks of the file left out."""

import contextlib
import json
import os
import subprocess
import sys
import time

import pytest
from support.tokenizer import CHATML, byte_tokenizer

from siftune.base.errors import KitError, SiftuneError
from siftune.offsite.kit import limited
from siftune.offsite.kit import tokenizer as kit_tokenizer
from siftune.offsite.kit.limited import Limits, run_limited
from siftune.offsite.kit.tokenizer import tokenizer_files, try_out

TRIAL = "siftune.offsite.kit.tokenizer_trial"
SMALL = Limits(memory_mb=100, cpu_s=30, wall_s=300)  # other processes may be about
ROOTS = limited._roots()
limits_memory = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")


def files_with(template=None, **parts):
    files = tokenizer_files(byte_tokenizer())
    whole = json.loads(files["tokenizer.json"]) | parts
    files["tokenizer.json"] = json.dumps(whole).encode()
    return files | ({} if template is None else {"chat_template.jinja": template.encode()})


def doubling(letter):
    part = {"type": "Replace", "pattern": {"String": letter}, "content": letter * 2}
    return {"type": "Sequence", "normalizers": [part] * 36}


@limits_memory
@pytest.mark.parametrize("letter", ["a", "ʬ"])
def test_a_normalizer_that_wants_all_memory_kills_the_child_and_not_us(letter):
    with pytest.raises(KitError, match=r"100 MB .* was ended by SIGABRT \(memory allocation of \d+ bytes failed\)"):
        try_out(files_with(normalizer=doubling(letter)), SMALL)


@limits_memory
def test_a_decoder_that_wants_all_memory_kills_the_child_and_not_us():
    part = doubling("a")
    decoder = {"type": "Sequence", "decoders": part["normalizers"]}
    with pytest.raises(KitError, match="was ended by SIGABRT"):
        try_out(files_with(decoder=decoder), SMALL)


@limits_memory
def test_ten_thousand_times_ten_thousand_numbers_kill_the_child_and_not_us():
    ids = {"id": "x", "ids": [1] * 10_000, "tokens": ["x"] * 10_000}
    pieces = [{"SpecialToken": {"id": "x", "type_id": 0}}] * 10_000 + [{"Sequence": {"id": "A", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {"x": ids}}
    with pytest.raises(KitError, match=r"was ended by SIG|needed more memory"):
        try_out(files_with(post_processor=post), SMALL)


def test_a_table_of_characters_that_panics_is_a_sentence():
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "A" * 84 + "AA=="}
    with pytest.raises(KitError, match=r"is no tokenizer that can be used|was ended by"):
        try_out(files_with(normalizer=normalizer), SMALL)


def test_a_pattern_that_panics_is_a_sentence():
    split = {"type": "Split", "pattern": {"Regex": r"^(\w+ ?)*$"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(
        KitError, match=r"it fails when a text .* is tokenised, .* \(Onig: .*retry-limit-in-match over\)"
    ):
        try_out(files_with(pre_tokenizer=split), SMALL)


def test_a_pattern_that_panics_on_a_long_run_alone_is_a_sentence():
    split = {"type": "Split", "pattern": {"Regex": r"^(\d|\d)*$"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(KitError, match=r"it fails when a text of 4097 .*'1111.*retry-limit-in-match"):
        try_out(files_with(pre_tokenizer=split), SMALL)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Replace", "pattern": {"Regex": r"[\s\S]"}, "content": ""}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Removed", "invert": False}},
    ],
)
def test_a_tokenizer_that_drops_all_text_is_refused(parts):
    with pytest.raises(KitError, match=r"tokenizer.json makes no token of '"):
        try_out(files_with(**parts), SMALL)


@pytest.mark.parametrize(("depth", "fits"), [(40, True), (180, False)])
def test_a_template_has_fewer_calls_within_calls_than_where_it_is_used(depth, fits):
    nested = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(" + str(depth) + ") }}" + CHATML
    outcome = contextlib.nullcontext() if fits else pytest.raises(KitError, match="recursion")
    with outcome:
        try_out(files_with(nested), SMALL)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.skipif(sys.platform == "win32", reason="processor time is not limited on Windows")
def test_a_template_without_end_is_stopped_by_its_processor_time():
    with pytest.raises(KitError, match=r"1 s of processor time; this was ended by SIG(XCPU|KILL)"):
        try_out(files_with(ENDLESS), Limits(2048, 1, 60))


def test_a_template_without_end_is_stopped_by_the_clock():
    start = time.monotonic()
    with pytest.raises(KitError, match="took more than 1 s"):
        try_out(files_with(ENDLESS), Limits(2048, 300, 1))
    assert time.monotonic() - start < 30


@limits_memory
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{% set x = namespace(y='aaaa') %}{% for i in range(40) %}{% set x.y = x.y + x.y %}{% endfor %}",
    ],
)
def test_a_template_that_wants_all_memory_is_a_sentence(template):
    with pytest.raises(KitError, match="needed more memory than it may have"):
        try_out(files_with(template), SMALL)


@limits_memory
def test_a_template_has_less_memory_than_a_tokenizer():
    """What it multiplies is multiplied when it is compiled, in every process, even if it is never written."""
    hidden = "{% if messages | length == 77 %}{{ 'a' * 150000000 }}{% endif %}"
    with pytest.raises(KitError, match="needed more memory than it may have"):
        try_out(files_with(CHATML + hidden), Limits(wall_s=300))


def test_a_trial_is_made_once_for_the_same_bytes_and_again_after_a_failure(monkeypatch):
    calls = []
    monkeypatch.setattr(kit_tokenizer, "_tried", {})
    monkeypatch.setattr(kit_tokenizer, "run_limited", lambda *args: calls.append(args) or "said")
    assert [try_out(files_with()), try_out(files_with()), try_out(files_with("other"))] == ["said"] * 3
    assert len(calls) == 2

    def fails(*args):
        calls.append(args)
        raise KitError("slow")

    monkeypatch.setattr(kit_tokenizer, "run_limited", fails)
    for _ in range(2):
        with pytest.raises(KitError, match="slow"):
            try_out(files_with("third"))
    assert len(calls) == 4


def test_the_child_knows_neither_our_environment_nor_torch(monkeypatch, tmp_path):
    """Asked by a module of its own, which answers with what it sees."""
    monkeypatch.setenv("SECRET", "canary")
    monkeypatch.setenv("PYTHONPATH", "/canary")
    (tmp_path / "spy.py").write_text(
        "import os, sys\n"
        "from siftune.offsite.kit import tokenizer_trial\n"
        "def answer(request):\n"
        "    open_to = [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]\n"
        "    return [sorted(os.environ), open_to, '/canary' in sys.path, request]\n"
    )
    monkeypatch.setattr(limited, "_roots", lambda: (*ROOTS, str(tmp_path)))
    names, heavy, leaked, request = run_limited("spy", {"é": "\ud800"}, SMALL)
    assert "SECRET" not in names
    assert heavy == []
    assert not leaked
    assert request == {"é": "\ud800"}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits on Windows")
def test_the_child_writes_no_file_and_cannot_raise_its_memory(monkeypatch, tmp_path):
    (tmp_path / "spy.py").write_text(
        "import resource\n"
        "from siftune.offsite.kit.limited import limit_memory\n"
        "def answer(path):\n"
        "    before = resource.getrlimit(resource.RLIMIT_AS)[0]\n"
        "    limit_memory(10**6)\n"
        "    after = resource.getrlimit(resource.RLIMIT_AS)[0]\n"
        "    try:\n"
        "        with open(path, 'w') as file:\n"
        "            file.write('a' * 10)\n"
        "    except OSError as error:\n"
        "        return [before, after, str(error)]\n"
    )
    monkeypatch.setattr(limited, "_roots", lambda: (*ROOTS, str(tmp_path)))
    before, after, said = run_limited("spy", str(tmp_path / "file"), SMALL)
    assert before == after
    assert sys.platform != "linux" or 100e6 < before < 2e9
    assert "File too large" in said


def test_where_no_child_can_work_the_kit_is_not_blamed(monkeypatch):
    monkeypatch.setattr(limited, "_roots", lambda: ())
    with pytest.raises(SiftuneError, match=r"cannot work here .*No module named 'siftune'") as caught:
        run_limited(TRIAL, {}, SMALL)
    assert not isinstance(caught.value, KitError)
    monkeypatch.setattr(sys, "executable", os.devnull)
    with pytest.raises(SiftuneError, match="no process can be started"):
        run_limited(TRIAL, {}, SMALL)


def test_a_child_that_ends_without_an_answer_is_named_by_how_it_ended():
    for code, words in ((-9, "was ended by SIGKILL"), (-11, "was ended by SIGSEGV"), (3, "ended with code 3")):
        done = subprocess.CompletedProcess([], code, b"", b"first\nlast \x1b[31m line\nnote: more\n")
        with pytest.raises(KitError, match=rf"{words} \(last \?\[31m line\)"):
            limited._answer_of(done, SMALL)
