import base64
import json
import os
import sys

import pytest
from support.keys import make_keys
from support.kits import contents, copied, edit, repair

from siftune.base.errors import KitError
from siftune.offsite.kit.folder import read_kit, write_kit
from siftune.offsite.kit.signing import load_signer, sign, verify
from siftune.offsite.kit.strict import sha256_of


@pytest.fixture(scope="module", autouse=True)
def _package():
    pytest.importorskip("model_signing")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed(keys, tmp_path_factory):
    return write_kit(tmp_path_factory.mktemp("signed") / "kit", contents(), signing_key=keys[0])


@pytest.fixture
def folder(signed, tmp_path):
    """A copy to damage, under another name."""
    return copied(signed.path, tmp_path / "renamed")


def digests(folder):
    """Hashes of all files but the signature."""
    return {path.name: sha256_of(path) for path in folder.iterdir() if path.name != "kit.sig"}


def test_a_signed_kit(signed, keys, folder):
    assert (signed.signed, signed.verified) == (True, False)
    for path in (signed.path, folder):
        checked, unchecked = read_kit(path, keys[1]), read_kit(path)
        assert (checked.signed, checked.verified) == (True, True)
        assert (unchecked.signed, unchecked.verified) == (True, False)
        assert checked.digest == signed.digest


@pytest.mark.parametrize("curve", ["SECP384R1", "SECP521R1"])
def test_other_curves(tmp_path, curve):
    private, public = make_keys(tmp_path, curve)
    kit = write_kit(tmp_path / "kit", contents(), signing_key=private)
    assert read_kit(kit.path, public).verified


def test_another_key_is_refused(folder, tmp_path):
    _, public = make_keys(tmp_path, name="other")
    with pytest.raises(KitError, match=r"kit\.sig is no signature of this folder by the key .*other\.pub\.pem"):
        read_kit(folder, public)
    assert read_kit(folder).signed


def test_a_forged_kit_is_refused_though_everything_else_is_repaired(folder, keys):
    edit(folder, "config.json", lambda c: c.update(rms_norm_eps=0.005))
    assert not read_kit(folder).verified
    with pytest.raises(KitError, match=r"kit\.sig is no signature of this folder"):
        read_kit(folder, keys[1])


@pytest.mark.parametrize("name", ["emulator.safetensors", "adapter.safetensors", "manifest.json", "tokenizer.json"])
def test_every_changed_file_is_noticed(folder, keys, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(KitError, match=f"kit.sig is no signature .*Hash mismatch for '{name}'"):
        verify(folder, keys[1], digests(folder))


@pytest.mark.parametrize("name", ["more.json", ".gitignore", ".gitattributes"])
def test_an_added_file_is_noticed(folder, keys, name):
    (folder / name).write_text("x")
    with pytest.raises(KitError, match="Extra files"):
        verify(folder, keys[1], digests(folder))
    with pytest.raises(KitError, match="does not belong there"):
        read_kit(folder, keys[1])


def test_a_missing_file_is_noticed(folder, keys):
    (folder / "chat_template.jinja").unlink()
    edit(folder, "manifest.json", lambda m: m["files"].pop("chat_template.jinja") and None)
    assert read_kit(folder)
    with pytest.raises(KitError, match="Missing files"):
        read_kit(folder, keys[1])


def test_no_signature_is_refused_only_where_one_is_asked_for(folder, keys):
    (folder / "kit.sig").unlink()
    assert not read_kit(folder).signed
    with pytest.raises(KitError, match=r"it has no kit\.sig, and a public key was given"):
        read_kit(folder, keys[1])


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_damaged_signatures_are_refused_in_words(folder, keys, capsys):
    good = (folder / "kit.sig").read_bytes()
    value = json.loads(good)
    del value["verificationMaterial"]["publicKey"]["hint"]
    value["dsseEnvelope"]["payload"] = base64.b64encode(b"{}").decode()
    bad = [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, good[:-9], json.dumps(value).encode()]
    bad += [flipped(good, place) for place in range(300, len(good) - 120, 97)]
    for data in bad:
        (folder / "kit.sig").write_bytes(data)
        with pytest.raises(KitError, match=r"kit\.sig"):
            read_kit(folder, keys[1])
    assert capsys.readouterr().out == "", "model-signing printed"
    (folder / "kit.sig").write_bytes(b" " * (1 << 20) + good)
    with pytest.raises(KitError, match=r"kit\.sig has \d+ bytes"):
        read_kit(folder, keys[1])


def test_a_linked_signature_is_refused(folder, keys, tmp_path):
    (folder / "kit.sig").rename(tmp_path / "outside")
    (folder / "kit.sig").symlink_to(tmp_path / "outside")
    with pytest.raises(KitError, match=r"kit\.sig is a link"):
        read_kit(folder, keys[1])
    with pytest.raises(KitError, match=r"kit\.sig"):
        verify(folder, keys[1], digests(folder))


def test_the_signature_does_not_name_the_folder(tmp_path, keys):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a").write_text("x")
    path = sign(tmp_path / "secret", keys[0])
    verify(tmp_path / "secret", keys[1], digests(tmp_path / "secret"))
    payload = json.loads(base64.b64decode(json.loads(path.read_text())["dsseEnvelope"]["payload"]))
    assert [subject["name"] for subject in payload["subject"]] == ["kit"]
    assert "secret" not in json.dumps(payload)
    assert os.fspath(tmp_path) not in path.read_text()


@pytest.mark.parametrize("content", [None, b"", b"not a key", "public", "curve", "password"])
def test_keys_that_cannot_be_used_leave_nothing_behind(tmp_path, keys, content):
    path = tmp_path / "key.pem"
    if content == "public":
        content = keys[1].read_bytes()
    elif content in ("curve", "password"):
        content = special_key(content)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KitError, match=r"key\.pem is no private key that can be used"):
        write_kit(tmp_path / "out" / "kit", contents(), signing_key=path)
    assert not (tmp_path / "out").exists()


def special_key(kind):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256K1() if kind == "curve" else ec.SECP256R1())
    hidden = s.NoEncryption() if kind == "curve" else s.BestAvailableEncryption(b"x")
    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, hidden)


def test_a_public_key_that_cannot_be_used(folder, keys):
    with pytest.raises(KitError, match="is no public key that can be used") as caught:
        read_kit(folder, keys[0])
    assert "sound copy" not in str(caught.value), "that is about the key, not about the kit"


def test_without_the_package_the_sentence_says_what_to_install(folder, keys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("model_signing")] + ["model_signing"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KitError, match=r"install them with: pip install 'siftune\[sign\]'"):
        load_signer(keys[0])
    with pytest.raises(KitError, match=r"siftune\[sign\]"):
        read_kit(folder, keys[1])
    assert read_kit(folder).signed


def test_a_kit_that_is_signed_again_is_another(folder, keys, tmp_path):
    private, public = make_keys(tmp_path, name="other")
    (folder / "kit.sig").unlink()
    repair(folder)
    sign(folder, private)
    assert read_kit(folder, public).verified
    with pytest.raises(KitError, match=r"kit\.sig"):
        read_kit(folder, keys[1])
