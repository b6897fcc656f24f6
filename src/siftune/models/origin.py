"""What is known of a base model beside its weights: its name on the hub, its licence, and the files that go with it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siftune.models.smollm2 import NAME as SMOLLM2
from siftune.models.smollm2 import REQUIREMENT, pull_smollm2

_SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PAPERS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].*)?", re.IGNORECASE)  # names of files
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # how the hub's cache calls the folder of owner/name


@dataclass(frozen=True)
class Origin:
    """What is known of a model."""

    place: str  # what `from_pretrained` takes on this machine: a folder, absolute, or a hub id
    hub_id: str | None = None  # its name on the hub; None where it is not known
    licence: str | None = None  # its licence as the hub calls it, such as apache-2.0; None where it is not known
    papers: tuple[Path, ...] = ()  # files that whoever hands it on hands on too: licence, notice


def origin_of(source: str) -> Origin:
    """Tell what is known of a model, a folder, a hub id, or `smollm2`, without asking the hub."""
    from huggingface_hub.errors import HFValidationError

    folder = Path(pull_smollm2() if source == SMOLLM2 else source).expanduser().absolute()
    if not folder.is_dir():
        try:
            return Origin(source, source, _licence(_cached_card(source)))
        except HFValidationError:
            return Origin(source)  # no hub id, but a folder that is gone by now, as after a long run
    papers = tuple(sorted(path for path in folder.iterdir() if path.is_file() and _PAPERS.fullmatch(path.name)))
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
    """A model's card, where the hub's cache has it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "README.md")
    return Path(found) if isinstance(found, str) else None


def _licence(card: Path | None) -> str | None:
    """The licence that a model's card names, a single word; cards are written by anybody."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        fields: dict[str, Any] | None = metadata_load(card) if card is not None and card.is_file() else None
    except (OSError, ValueError, YAMLError):
        return None
    named = fields.get("license") if fields else None
    return named if isinstance(named, str) and re.fullmatch(r"[\w.-]+", named) else None
