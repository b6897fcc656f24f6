"""The public key of a model's owner, as an option of all commands that read a kit."""

import shutil
from pathlib import Path

import pytest
from support.commands import EMULATE, TRAIN, error_of, siftune
from support.keys import make_keys
from support.kits import edit, read_json
from support.opened import opened
from support.tiny_run import save_rows

from siftune.cli.main import main
from siftune.offsite.kit.folder import read_kit
from siftune.offsite.kit.signing import sign


@pytest.fixture(scope="module")
def signed(half, tmp_path_factory):
    """Rows, a signed kit, runs on it, the owner's key and another."""
    pytest.importorskip("model_signing")
    place = tmp_path_factory.mktemp("signed")
    rows = save_rows(place / "rows.jsonl")
    private, _ = make_keys(place, name="owner")
    make_keys(place, name="other")
    way = ["--model", half, "--calibration", rows, "--out", place / "kit", "--sign", private, *EMULATE]
    assert main(["emulate", *map(str, way)]) == 0
    for name, options in (("full", TRAIN), ("lora", (*TRAIN[:4], *TRAIN[6:], "--adapter", "lora", "--rank", "2"))):
        way = ["--model", place / "kit", "--train", rows, "--out", place / name, *options]
        assert main(["train", *map(str, way), "--public-key", f"{place}/owner.pub.pem"]) == 0
        assert "public_key" not in (place / name / "recipe.yaml").read_text()
    return place


def copied(signed, place):
    """A copy to change, with recipes that name its own kit and rows."""
    shutil.copytree(signed, place)
    for recipe in place.glob("*/recipe.yaml"):
        recipe.write_text(recipe.read_text().replace(str(signed), str(place)))
    return place


def snapshot(run):
    """Contents of all files of a run."""
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def commands(place, half, what, out):
    """What takes a key, on a kit or model, or on a run."""
    rows = place / "rows.jsonl"
    if (place / what / "recipe.yaml").exists():
        yield ("eval", place / what, "--data", rows, "--limit", "2", "--metrics", "perplexity")
        return
    yield ("train", "--model", place / what, "--train", rows, "--out", out, *TRAIN)
    sweep = ("--eval", rows, "--rates", "1e-3", "--out", f"{out}-sweep")
    yield ("find-lr", "--model", place / what, "--train", rows, *sweep, *TRAIN)
    yield ("eval", place / what, "--data", rows, "--limit", "2", "--metrics", "perplexity")


@pytest.mark.parametrize("what", ["kit", "full", "lora"])
def test_a_key_is_asked_whether_the_kit_is_the_owners(signed, half, tmp_path, capsys, what):
    for arguments in commands(signed, half, what, tmp_path / "out"):
        refusal = error_of(capsys, *arguments, "--public-key", signed / "other.pub.pem")
        assert f"kit {signed}/kit: kit.sig is no signature" in refusal
        assert "is no public key" in error_of(capsys, *arguments, "--public-key", signed / "rows.jsonl")
        assert arguments[0] != "train" or not (tmp_path / "out" / "recipe.yaml").exists()
        siftune(capsys, *arguments, "--public-key", signed / "owner.pub.pem")


@pytest.mark.parametrize("what", ["kit", "full"])
def test_a_kit_that_was_forged_or_whose_signature_is_gone_is_refused_with_a_key(signed, half, tmp_path, capsys, what):
    place = copied(signed, tmp_path / "place")
    forged(place / "kit", place)
    for arguments in commands(place, half, what, tmp_path / "out"):
        assert "Hash mismatch" in error_of(capsys, *arguments, "--public-key", place / "owner.pub.pem")
    unsigned(place / "kit", place)
    for arguments in commands(place, half, what, tmp_path / "out"):
        assert "it has no kit.sig" in error_of(capsys, *arguments, "--public-key", place / "owner.pub.pem")


def unsigned(kit, place):
    (kit / "kit.sig").unlink()


def forged(kit, place):
    """Other contents, the manifest in line with them, and the owner's signature of before."""
    edit(kit, "config.json", lambda config: config.update(rms_norm_eps=2e-5))


def signed_by_another(kit, place):
    """The owner's contents."""
    sign(kit, place / "other.pem")


def forged_and_signed(kit, place):
    forged(kit, place)
    signed_by_another(kit, place)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unsigned, "it has no kit.sig"),
        (forged, "Hash mismatch"),
        (signed_by_another, "no signature of this folder by the key"),
        (forged_and_signed, "no signature of this folder by the key"),
    ],
)
def test_a_run_does_not_resume_on_a_kit_that_the_key_did_not_sign(signed, tmp_path, capsys, change, words):
    place = copied(signed, tmp_path / "place")
    more = ("train", "--resume", place / "full", "--steps", "3")
    before = snapshot(place / "full")
    change(place / "kit", place)
    assert words in error_of(capsys, *more, "--public-key", place / "owner.pub.pem")
    assert snapshot(place / "full") == before


@pytest.mark.parametrize("key", [(), ("--public-key", "other.pub.pem")])
def test_a_run_does_not_resume_on_another_kit_whoever_has_signed_it(signed, tmp_path, capsys, key):
    """Nobody need give the key again: the checkpoint says of which kit it is."""
    place = copied(signed, tmp_path / "place")
    forged_and_signed(place / "kit", place)
    key = [place / word if word.endswith(".pem") else word for word in key]
    refusal = error_of(capsys, "train", "--resume", place / "full", "--steps", "3", *key)
    assert f"is of a run on the kit {read_kit(signed / 'kit').digest[:12]}" in refusal
    assert f"is now the kit {read_kit(place / 'kit').digest[:12]}" in refusal


@pytest.mark.parametrize("run", ["full", "lora", "lora/adapter"])
def test_a_run_is_not_measured_on_another_kit(signed, tmp_path, capsys, run):
    place = copied(signed, tmp_path / "place")
    measure = ("--data", place / "rows.jsonl", "--limit", "2", "--metrics", "perplexity", "--base", place / "kit")
    siftune(capsys, "eval", place / run, *measure)
    forged_and_signed(place / "kit", place)
    assert "it was made for another kit" in error_of(capsys, "eval", place / run, *measure)


@pytest.mark.parametrize(("run", "words"), [("full", "is no kit"), ("lora", "is none"), ("lora/adapter", "is none")])
def test_a_run_on_a_kit_is_not_measured_on_an_ordinary_model(signed, half, capsys, run, words):
    """The kit may have fewer layers, and its last ones other numbers."""
    measure = ("--data", signed / "rows.jsonl", "--limit", "2", "--metrics", "perplexity", "--base", half)
    assert f"but {half} {words}" in error_of(capsys, "eval", signed / run, *measure)


def test_a_run_resumes_on_its_kit_with_the_key_and_without(signed, tmp_path, capsys):
    place = copied(signed, tmp_path / "place")
    more, key = ("train", "--resume", place / "full", "--steps"), ("--public-key", place / "owner.pub.pem")
    assert "no signature" in error_of(capsys, *more, "3", "--public-key", place / "other.pub.pem")
    assert siftune(capsys, *more, "3", *key)[0]["steps"] == 3
    assert siftune(capsys, *more, "4")[0]["steps"] == 4
    assert read_json(place / "full" / "run.json")["source"] == {"kit": read_kit(signed / "kit").digest}


def test_a_key_with_what_is_no_kit_is_refused(signed, half, base, tmp_path, capsys):
    key = ("--public-key", signed / "owner.pub.pem")
    words = "is no kit, and --public-key is to check a kit's signature: give a kit, or leave it out"
    rows = signed / "rows.jsonl"
    options = ("--train", rows, "--steps", "1", "--batch-size", "2", "--rank", "2", "--template", "none")
    train = ("train", "--model", base, "--out", tmp_path / "run", *options)
    assert error_of(capsys, *train, *key) == f"{base} {words}"
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    siftune(capsys, *train)
    measure = ("--data", rows, "--limit", "2", "--metrics", "perplexity")
    for what in (base, tmp_path / "run"):
        assert error_of(capsys, "eval", what, *measure, *key) == f"{base} {words}"
    assert words in error_of(capsys, "eval", signed / "kit", base, *measure, *key)
    # a kit whose manifest no longer says what it is, or that was moved away
    shutil.copytree(signed / "kit", tmp_path / "kit")
    (tmp_path / "kit" / "manifest.json").write_text("{}")
    for model, why in (
        (tmp_path / "kit", words),
        (tmp_path / "gone", f"model folder {tmp_path / 'gone'} does not exist (working directory: {Path.cwd()})"),
    ):
        assert why in error_of(capsys, "train", "--model", model, "--out", tmp_path / "new", *options, *key)


# --- what is opened how often ---


@pytest.mark.parametrize("command", ["train full", "train lora", "eval", "eval of a run", "plug", "verify a return"])
def test_no_file_of_a_kit_is_opened_but_to_be_checked_and_to_be_loaded(
    signed, half, tmp_path, capsys, monkeypatch, command
):
    kit, key, rows = signed / "kit", ("--public-key", signed / "owner.pub.pem"), signed / "rows.jsonl"
    train = ("train", "--model", kit, "--train", rows, "--out", tmp_path / "run", *TRAIN[:4], *TRAIN[6:])
    measure = ("--data", rows, "--limit", "2", "--metrics", "perplexity")
    back = signed / "full" / "return"
    arguments = {
        "train full": (*train, "--adapter", "full"),
        "train lora": (*train, "--adapter", "lora", "--rank", "2", "--save-every", "1"),
        "eval": ("eval", kit, *measure),
        "eval of a run": ("eval", signed / "lora", *measure),
        "plug": ("plug", "--model", half, "--kit", kit, "--return", back, "--out", tmp_path / "tuned"),
        "verify a return": ("verify", back, "--kit", kit),
    }[command]
    with opened(kit, monkeypatch) as counts:
        siftune(capsys, *arguments, *key)
    small = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    loaded = {
        "plug": set(), "verify a return": {"adapter.safetensors"}
    }.get(command, small | {"emulator.safetensors", "adapter.safetensors"})  # fmt: skip
    # once more, before it is checked, only for its kind: train and eval ask whether it is a kit, plug and verify
    # whether kit and return are swapped (offsite/cli/paths.py); nothing that was read then is used
    looked_at = {"manifest.json"}
    # and again, for a return of whole layers, what a narrower dtype has rounded: it is held to its hash once more
    looked_at |= {"adapter.safetensors"} if command == "train full" else set()
    names = {path.name for path in kit.iterdir()}
    assert counts == {name: 1 + (name in loaded) + (name in looked_at) for name in names}
