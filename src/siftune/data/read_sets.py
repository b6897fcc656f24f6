"""Read rows from data sets of several files: folders of `save_to_disk`, other folders, and data sets on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siftune.base.errors import DataError
from siftune.base.text import one_line

if TYPE_CHECKING:
    from datasets import Dataset

# values that Python has no equivalent for: dates beyond its calendar, text that is not UTF-8, an unknown time zone
UNREADABLE = (OverflowError, ValueError, LookupError, RecursionError)


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
        DataError: It cannot be read, or has no such split.
    """
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # of Arrow, JSON and datasets
        reason = one_line(str(error)) or type(error).__name__
        raise DataError(f"{source} cannot be read as a saved data set: {reason}; save the data set again") from error
    if isinstance(data, datasets.Dataset):
        return _records(data, source)
    if split not in data:
        raise DataError(f"{source} has no split {split!r}; it has {', '.join(map(one_line, data))}")
    return _records(data[split], f"{source}@{split}")


def read_set(source: str, split: str, endings: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Read a folder of data files, or a data set on the hub; since version 4, `datasets` runs no code from there.

    Args:
        source: The folder, or an id on the hub, optionally with a configuration after a colon.
        split: The split to read.
        endings: Supported endings of files, for the message.

    Returns:
        As `read.Records`.

    Raises:
        DataError: It cannot be loaded, or some files of a folder would not be read.
    """
    import datasets

    name, _, configuration = source.partition(":")
    folder = Path(name).expanduser()
    try:
        builder = datasets.load_dataset_builder(name, configuration or None)
        if folder.is_dir():
            _refuse_unread(builder.config.data_files or {}, folder, source, endings)
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


def _refuse_unread(files: Mapping[Any, Iterable[str]], folder: Path, source: str, endings: Iterable[str]) -> None:
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


def _records(data: Dataset, source: str) -> Iterator[tuple[str, Any]]:
    """The rows of a data set without images and other media, whose decoding needs further libraries."""
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
