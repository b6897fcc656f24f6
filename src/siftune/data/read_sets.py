"""Read rows from data sets of several files: folders of `save_to_disk`, other folders, and data sets on the hub.

A data set names its files itself, in `state.json` or in the header of its card. A name could lead to any file of the
user. Only files of the data set are read, and the log names those of a folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from siftune.base.errors import DataError, InputError
from siftune.base.json_files import read_json
from siftune.base.links import is_inside
from siftune.base.text import one_line

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# values that Python has no equivalent for: dates beyond its calendar, text that is not UTF-8, an unknown time zone
UNREADABLE = (OverflowError, ValueError, LookupError, RecursionError)
_SHOWN = 3  # files in the log
_LARGEST = 2**24  # bytes of `state.json` and `dataset_dict.json`


class _File(BaseModel):
    filename: str


class _State(BaseModel):
    """The field of `state.json` that names files."""

    files: list[_File] = Field(alias="_data_files")


class _Splits(BaseModel):
    """`dataset_dict.json`."""

    splits: list[str]


def is_saved(folder: Path) -> bool:
    """Whether a folder is of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_saved(folder: Path, source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Read a folder of `save_to_disk`.

    Args:
        folder: The folder.
        source: Its name in messages.
        split: The split to read, if it has several.

    Returns:
        As `read.Records`.

    Raises:
        DataError: It cannot be read, has no such split, or names files elsewhere.
    """
    import datasets

    advice = "save the data set again"
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = read_json(folder / "dataset_dict.json", _Splits, advice, _LARGEST).splits
            if split not in splits:
                raise DataError(f"{source} has no split {split!r}; it has {', '.join(map(one_line, splits))}")
            _refuse_outside([folder / split], folder, source)
            folder, source = folder / split, f"{source}@{split}"
        names = [file.filename for file in read_json(folder / "state.json", _State, advice, _LARGEST).files]
        _refuse_outside([folder / name for name in ("state.json", "dataset_info.json", *names)], folder, source)
        _tell(names, source)
        data = datasets.Dataset.load_from_disk(str(folder))
    except InputError as error:
        raise DataError(str(error)) from error
    except Exception as error:  # of Arrow, JSON and datasets
        reason = one_line(str(error)) or type(error).__name__
        raise DataError(f"{source} cannot be read as a saved data set: {reason}; {advice}") from error
    return _records(data, source)


def read_set(source: str, split: str, endings: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Read a folder of data files, or a data set on the hub; since version 4, `datasets` runs no code from there.

    Args:
        source: The folder, or an id on the hub, optionally with a configuration after a colon.
        split: The split to read.
        endings: Supported endings of files, for the message.

    Returns:
        As `read.Records`.

    Raises:
        DataError: It cannot be loaded, or names files elsewhere.
    """
    import datasets

    name, _, configuration = source.partition(":")
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            _check_card(folder, source)
        builder = datasets.load_dataset_builder(name, configuration or None)
        files = {str(own): paths for own, paths in (builder.config.data_files or {}).items()}
        _check_files(files, name, source)
        if folder.is_dir():
            _refuse_unread(files, folder, source, endings)
            _tell([os.path.relpath(path, folder.resolve()) for path in files.get(split, ())], source)
        builder.download_and_prepare()
        data = builder.as_dataset(split=split)
    except DataError:
        raise
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{source} is no data file, and no data set of that name (split {split!r}) could be loaded: "
            f"{reason.rstrip('.')}; check the name, the split and the network, or give a file ending in "
            f"{', '.join(endings)}"
        ) from error
    return _records(data, f"{source}@{split}")


def _check_card(folder: Path, source: str) -> None:
    """Refuse a card with addresses of files elsewhere, before any is asked for, or with parts that YAML repeats."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    card, header = folder / "README.md", folder / ".huggingface.yaml"
    parts: list[tuple[Any, Any]] = [
        ("", metadata_load(card) if card.is_file() else None),
        ("", yaml.safe_load(header.read_text(encoding="utf-8")) if header.is_file() else None),
    ]
    visited = set[int]()
    while parts:
        key, part = parts.pop()  # the key at the top of the card that the part belongs to
        if isinstance(part, str) and "://" in part and key == "configs":
            raise DataError(_elsewhere(source, part))
        if isinstance(part, Mapping | list):
            if id(part) in visited:  # a few lines of aliases can stand for endless ones
                raise DataError(f"the card of {source} has aliases such as *name: write out what they repeat")
            visited.add(id(part))
            pairs = part.items() if isinstance(part, Mapping) else enumerate(part)
            parts += [(key or name, value) for name, value in pairs]


def _check_files(files: Mapping[Any, Iterable[str]], name: str, source: str) -> None:
    """Refuse files, by split, that do not belong to a data set: a folder, or an id on the hub."""
    folder = Path(name).expanduser()
    paths = [str(path) for each in files.values() for path in each]
    if folder.is_dir():
        _refuse_outside(map(Path, paths), folder, source)
        return
    for path in paths:
        if not path.rpartition("::")[2].startswith(f"hf://datasets/{name}@"):
            raise DataError(_elsewhere(source, path))


def _refuse_unread(files: Mapping[str, Iterable[str]], folder: Path, source: str, endings: Iterable[str]) -> None:
    """Refuse a folder without a card in which some names have splits: `datasets` would leave out the others."""
    if any((folder / card).is_file() for card in ("README.md", ".huggingface.yaml")):
        return
    read = {Path(path).resolve() for paths in files.values() for path in paths}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_data = path.suffix.lower() in endings and not any(part.startswith((".", "__")) for part in name.parts)
        if is_data and path.is_file() and path.resolve() not in read:
            raise DataError(
                f"{source}: {one_line(str(name))} would not be read, since its name has no split, as other names have; "
                "name the files"
            )


def _refuse_outside(paths: Iterable[Path], folder: Path, source: str) -> None:
    for path in paths:
        if not is_inside(path, folder):
            raise DataError(_elsewhere(source, str(path)))
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"{source}: {one_line(str(path))} is neither a file nor a folder; remove it")


def _elsewhere(source: str, path: str) -> str:
    return f"{source} takes rows from {one_line(path)}, which is no file of the data set: name the file itself"


def _tell(names: list[str], source: str) -> None:
    """Report the files of a folder that are read."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    logger.info("%s: reading %s%s", source, ", ".join(map(one_line, names[:_SHOWN])), more)


def _records(data: Dataset, source: str) -> Iterator[tuple[str, Any]]:
    """The rows of a data set without images and other media, whose decoding would read the files that rows name."""
    data = data.remove_columns([name for name, feature in data.features.items() if _is_media(feature)])
    number = 0
    while number < len(data):
        try:
            for record in data.select(range(number, len(data))):
                number += 1
                yield f"{source} row {number}", record
        except UNREADABLE as error:  # the next row can be read
            number += 1
            yield f"{source} row {number}", unreadable(f"{source} row {number}", error)


def _is_media(feature: Any) -> bool:
    """Whether a column's feature holds media at any depth."""
    import datasets

    inner = getattr(feature, "feature", feature)
    if inner is not feature:
        return _is_media(inner)
    if isinstance(feature, Mapping):
        return any(map(_is_media, feature.values()))
    return hasattr(feature, "decode_example") and not isinstance(feature, datasets.Json)


def unreadable(origin: str, error: Exception) -> DataError:
    """The error for a row with a value that Python cannot represent."""
    return DataError(f"{origin}: a value cannot be read ({one_line(str(error))}); correct it, or remove its column")
