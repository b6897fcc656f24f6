"""Signatures on kits, by the package model-signing with a pair of keys (install siftune[sign]).

A signature covers every other file of the folder: the data owner knows from whom the kit is and that nothing was
changed, added or removed. Keys are PEM files on the curve P-256, P-384 or P-521, without a password:

    openssl ecparam -name prime256v1 -genkey -noout -out owner.pem     # stays with the owner
    openssl ec -in owner.pem -pubout -out owner.pub.pem                # for the data owner, by another way than the kit

What the signature says is public: the names and hashes of the files and a hash of the public key. model-signing would
also write down the folder's own name; that is replaced by "kit". This checks it as well:

    model_signing verify key KIT --signature KIT/kit.sig --public-key owner.pub.pem
"""

import contextlib
import io
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from siftune.base.errors import KitError
from siftune.offsite.kit.manifest import LIMITS, SIGNATURE
from siftune.offsite.kit.strict import brief, read_bytes


def sign(folder: Path, private_key: Path) -> Path:
    """Sign a complete kit: write `kit.sig` into its folder, and return its path.

    Raises:
        KitError: The package is not installed, or the key cannot be used.
    """
    config = load_signer(private_key).set_hashing_config(_hashing())
    path = folder / SIGNATURE
    try:
        config.sign(folder, path)
    except Exception as error:
        path.unlink(missing_ok=True)
        raise KitError(
            f"{folder} cannot be signed ({brief(error)}); check the key {private_key} and the disk"
        ) from error
    return path


def verify(folder: Path, public_key: Path, digests: Mapping[str, str]) -> None:
    """Check that the owner of a key has signed files of these SHA-256, and no others; only the signature is read.

    Who has hashed what it read need not ask whether a file was exchanged between the two.

    Raises:
        KitError: The package is not installed, the key cannot be used, there is no signature, or it is not right.
    """
    config = load_verifier(public_key).set_hashing_config(_hashed(digests))
    path = folder / SIGNATURE
    if not path.is_file():
        raise KitError(f"it has no {SIGNATURE}, and a public key was given to check it")
    data = read_bytes(path, LIMITS[SIGNATURE])
    try:
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            copy = Path(place, SIGNATURE)  # model-signing would open whatever is in the kit by now
            copy.write_bytes(data)
            config.verify(folder, copy)  # prints about old signatures
    except Exception as error:
        raise KitError(
            f"{SIGNATURE} is no signature of this folder by the key {public_key} ({_reason(error)})"
        ) from error


def load_signer(private_key: Path) -> Any:
    """Load the private key into model-signing's configuration, also to learn before long work that it can be used.

    Raises:
        KitError: It cannot, or the package is not installed.
    """
    return _load(private_key, "signing")


def load_verifier(public_key: Path) -> Any:
    """Load the public key; as `load_signer`."""
    return _load(public_key, "verifying")


def _load(key: Path, part: str) -> Any:
    try:
        module = import_module(f"model_signing.{part}")
    except ImportError as error:
        raise KitError(
            "signatures need the packages model-signing and pyopenssl; install them with: pip install 'siftune[sign]'"
        ) from error
    private = part == "signing"
    try:
        if private:
            return module.Config().use_elliptic_key_signer(private_key=key)
        return module.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise KitError(
            f"{key} is no {'private' if private else 'public'} key that can be used ({brief(error)}); it must be a PEM "
            "file on the curve P-256, P-384 or P-521, without a password"
        ) from error


def _reason(error: Exception) -> str:
    """The message of model-signing, without the digests in it."""
    text = str(error).partition(": Expected")[0].replace("\\'", "'")
    return (
        brief(ValueError(text.replace("Signature mismatch: ", "").lstrip("[\"'").rstrip(']"'))) or type(error).__name__
    )


def _hashing() -> Any:
    """Hash every file but the signature; git's files too, which model-signing leaves out by default."""
    hashing = import_module("model_signing.hashing")

    class Nameless(hashing.Config):  # type: ignore[misc, name-defined]
        """As its base, but the folder is called "kit", wherever it is."""

        def hash(self, model_path: Any, **options: Any) -> Any:
            hashed = super().hash(model_path, **options)
            return _listed({d.identifier: d.digest for d in hashed.resource_descriptors()}, hashed.serialization_type)

    return Nameless().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _hashed(digests: Mapping[str, str]) -> Any:
    """Take the hashes that are given, and open no file."""
    hashing, manifest = import_module("model_signing.hashing"), import_module("model_signing.manifest")
    hashes = {name: manifest.hashing.Digest("sha256", bytes.fromhex(digest)) for name, digest in digests.items()}

    class Known(hashing.Config):  # type: ignore[misc, name-defined]
        """As its base, but the hashes are there already."""

        def hash(self, model_path: Any, **options: Any) -> Any:
            return _listed(hashes, {"method": "files", "hash_type": "sha256", "allow_symlinks": False})

    return Known()


def _listed(digests: Mapping[str, Any], kind: dict[str, Any]) -> Any:
    """The files and hashes that model-signing signs."""
    manifest = import_module("model_signing.manifest")
    items = [manifest.FileManifestItem(path=PurePosixPath(name), digest=d) for name, d in digests.items()]
    return manifest.Manifest("kit", items, manifest.SerializationType.from_args(kind))
