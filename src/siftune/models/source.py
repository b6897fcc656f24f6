"""Sources of models: a local folder, a hub id, or the packaged small model `smollm2`; their origin and licence.

Hub ids are checked with one short request. Loading asks for one file after the other, each with retries, and so takes
minutes to fail without a network.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from siftune.base.errors import ModelError
from siftune.base.settings import nearest
from siftune.models.smollm2 import NAME as SMOLLM2
from siftune.models.smollm2 import REQUIREMENT, pull_smollm2

_SECONDS = 5.0  # for the hub to answer
_SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_NOTICES = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].*)?", re.IGNORECASE)  # names of files
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # name of the folder of owner/name in the hub's cache


def check_source(source: str) -> None:
    """Refuse a source that is no model, quickly and before anything is downloaded or loaded.

    Raises:
        ModelError: As `load_model`, but the contents of a folder are not checked.
    """
    if source == SMOLLM2:
        return
    name = resolve(source)
    if isinstance(name, str) and (why := why_missing(name)):
        raise ModelError(not_there(name, why))


def resolve(source: str) -> str | Path:
    """Turn a source into a folder, or return a hub id as is; `smollm2` is downloaded if necessary.

    Raises:
        ModelError: `source` is a path that does not exist, a file, a folder that holds no model, or a name that cannot
            be a hub id.
    """
    if source == SMOLLM2:
        return pull_smollm2()
    if not source:
        raise ModelError(f"no model given: name a folder, a hub id or {SMOLLM2}")
    path = Path(source).expanduser()
    if path.is_dir():
        return _model_folder(path.absolute())
    if path.is_file():
        raise ModelError(f"{source} is a file: give the folder that holds it and a config.json")
    if source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1 or "\\" in source:
        raise ModelError(f"model folder {path} does not exist (working directory: {Path.cwd()})")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ModelError(f"{source!r} is neither a folder nor a hub id such as owner/name, nor {SMOLLM2}")
    return source


def _model_folder(path: Path) -> Path:
    """Return `path` if it holds a model; the most common mistakes are the folders of an adapter and of a kit."""
    if (path / "emulator.safetensors").is_file():
        raise ModelError(f"{path} holds a kit, not a complete model: give the model that it was made from")
    if (path / "config.json").is_file():
        return path
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} holds an adapter, not a model: give the adapter's base model")
    if (path / "recipe.yaml").is_file():
        raise ModelError(
            f"{path} is a run, not a model: give its base model, with --from-adapter {path} to continue training its "
            f"adapter, or the model that `siftune export {path}` writes"
        )
    raise ModelError(f"{path} holds no model: there is no config.json in it")


@cache
def why_missing(name: str) -> str | None:
    """Say why a hub id cannot be loaded; None if it is in the cache, or the hub has it or may have it."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        HfApi().model_info(name, timeout=_SECONDS)
    except HFValidationError:
        return "it is no name that the hub can have"
    except GatedRepoError:
        return None  # loading says what to do
    except RepositoryNotFoundError:
        return "the hub has no such model that you may see"
    except HfHubHTTPError:
        return None
    except OfflineModeIsEnabled:
        return "the hub is not asked, as HF_HUB_OFFLINE is set"
    except Exception as error:  # of the network; the class depends on the library
        return f"the hub cannot be reached ({type(error).__name__})"
    return None


def similar_folder(name: str, suits: Callable[[Path], bool]) -> Path | None:
    """Return the folder, if any, that `suits` and has the name most similar to a missing one, in its parent folder."""
    parent = Path(name).expanduser().parent
    if not parent.is_dir():
        return None
    close = nearest(Path(name).name, (place.name for place in parent.iterdir() if suits(place)))
    return None if close is None else parent / close


def not_there(name: str, why: str) -> str:
    """Say in one sentence that no folder, nor the hub or its cache, has a model, and what to do."""
    close = similar_folder(name, lambda path: (path / "config.json").is_file()) or nearest(name.lower(), [SMOLLM2])
    guess = f"did you mean {close}? If not, " if close else ""
    cache = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return (
        f"cannot load the model {name!r}: no such folder (working directory: {Path.cwd()}), and neither the hub nor "
        f"its cache in {cache} gave a causal language model ({why}); {guess}give a folder, point HF_HOME at a filled "
        f"cache, or use {SMOLLM2}, which needs no hub (`siftune pull {SMOLLM2}`)"
    )


@dataclass(frozen=True)
class Origin:
    """Origin of a model: its place, hub id, licence and notices."""

    place: str  # argument of `from_pretrained` on this machine: a folder, absolute, or a hub id
    hub_id: str | None = None  # None: unknown
    licence: str | None = None  # name of its licence on the hub, such as apache-2.0; None: unknown
    papers: tuple[Path, ...] = ()  # files to distribute with the model: licence, notice


def origin_of(source: str) -> Origin:
    """Find the origin of a model, a folder, a hub id, or `smollm2`, without asking the hub."""
    from huggingface_hub.errors import HFValidationError

    folder = Path(pull_smollm2() if source == SMOLLM2 else source).expanduser().absolute()
    if not folder.is_dir():
        try:
            return Origin(source, source, _licence(_cached_card(source)))
        except HFValidationError:
            return Origin(source)  # no hub id: a folder that was removed meanwhile, as during a long run
    papers = tuple(sorted(path for path in folder.iterdir() if path.is_file() and _NOTICES.fullmatch(path.name)))
    if _is_smollm2(folder):
        return Origin(str(folder), _SMOLLM2_ON_HUB, "apache-2.0", papers)
    cached = next(filter(None, map(_CACHED.fullmatch, folder.parts)), None)
    return Origin(str(folder), f"{cached[1]}/{cached[2]}" if cached else None, _licence(folder / "README.md"), papers)


def _is_smollm2(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["source"] == REQUIREMENT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _cached_card(hub_id: str) -> Path | None:
    """Find a model's card in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(hub_id, "README.md")
    return Path(card) if isinstance(card, str) else None


def _licence(card: Path | None) -> str | None:
    """Read the licence from a model's card, a single word; the card is untrusted."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        fields: dict[str, Any] | None = metadata_load(card) if card is not None and card.is_file() else None
    except (OSError, ValueError, YAMLError):
        return None
    named = fields.get("license") if fields else None
    return named if isinstance(named, str) and re.fullmatch(r"[\w.-]+", named) else None
