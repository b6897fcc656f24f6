"""Tokens that were made before: a folder for each set of rows, by what they and their tokenizer are.

    CACHE/tokens/KEY/
      tokens.arrow   the columns, in Arrow's stream format
      about.json     what was wrong with rows, how many were cut, and the hash of the other file

KEY is a hash of what the rows say, of the tokenizer, its chat template and special tokens, of the settings, and of the
versions of the libraries that tokenise; where a row stands is not part of it. A folder that is damaged is made anew.
One that cannot be written is no reason not to train. All folders together take 4 GB at the most: those that were used
longest ago go first (ours), and the newest stays, however large it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from siftune.base.files import Progress, hash_of
from siftune.data.rows import Row, said
from siftune.data.tokens import Form, Tokens, tokens_of
from siftune.models.smollm2 import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LAYOUT = 1  # of the files, and of what they hold
_FROM = 2000  # rows from which it is worth a file
_MOST = 4 * 10**9  # bytes that all folders take
_ARROW, _ABOUT = "tokens.arrow", "about.json"


def cached_tokens(rows: Sequence[Row], form: Form, progress: Progress | None = None) -> Tokens:
    """Tokenise rows as `tokens_of`, or take the tokens that were made of them before.

    Where many rows are tokenised, the tokens stay in the cache, and the table is a view of the file there.

    Args:
        rows: at least one.
        form: how.
        progress: told how many rows are done.

    Raises:
        InputError: as `tokens_of`.
    """
    key = _key(rows, form) if len(rows) >= _FROM else None
    if key is None:
        return tokens_of(rows, form, progress)
    folder = cache_root() / "tokens" / key
    found = _read(folder)
    if found is not None:
        with suppress(OSError):
            os.utime(folder)  # it was used now
        logger.info("tokens of %d rows are in %s", len(rows), folder)
        return found
    made = tokens_of(rows, form, progress)
    if not _write(folder, made):
        return made
    _make_room(folder)
    return _read(folder) or made


def _key(rows: Sequence[Row], form: Form) -> str | None:
    """A hash of all that decides what the tokens are; None where the tokenizer cannot be told from others."""
    tokenizer = _said_of(form.tokenizer)
    if tokenizer is None:
        return None
    versions = [version(name) for name in ("transformers", "tokenizers", "jinja2")]
    options = [form.max_length, form.template, form.completion_only]
    digest = hashlib.sha256(json.dumps([_LAYOUT, versions, options, tokenizer]).encode())
    for row in said(rows):
        digest.update(len(row).to_bytes(8, "big") + row)
    return digest.hexdigest()[:32]


def _said_of(tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """What a tokenizer does, as text: of those of the tokenizers library, which can tell it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    template = json.dumps(tokenizer.chat_template)
    today = str(date.today()) if "strftime_now" in template else ""  # some templates write the date
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    splits = str(getattr(tokenizer, "split_special_tokens", None))
    return [kind, backend.to_str(), template, repr(tokenizer.special_tokens_map), splits, today]


def _read(folder: Path) -> Tokens | None:
    """Read a folder; None where there is none, or it is not as it was written."""
    from datasets import Dataset

    if not folder.is_dir():
        return None
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if about["sha256"] != hash_of(folder / _ARROW):
            raise ValueError(f"{_ARROW} is not what was written")
        data = Dataset.from_file(str(folder / _ARROW))
        bad = {int(place): str(reason) for place, reason in about["bad"]}
        return Tokens(data, bad, int(about["cut"]), Counter(about["notes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the cached tokens in %s are damaged (%s); they are made anew", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write(folder: Path, tokens: Tokens) -> bool:
    """Write a folder beside its place and move it there; False, and a warning, where that cannot be done."""
    import pyarrow

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as beside:
            path = Path(beside) / _ARROW
            table = tokens.data.data.table
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            about = {
                "sha256": hash_of(path),
                "bad": list(tokens.bad.items()),
                "cut": tokens.cut,
                "notes": dict(tokens.notes),
            }
            (Path(beside) / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
            _move(Path(beside), folder)
    except OSError as error:
        logger.warning("tokens are not cached: %s cannot be written (%s)", folder, error.strerror or error)
        return False
    return True


def _move(beside: Path, folder: Path) -> None:
    """Move a folder's files to where they belong, unless another process was there first."""
    made = beside / "made"
    made.mkdir(mode=0o700)
    for name in (_ARROW, _ABOUT):
        os.replace(beside / name, made / name)
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _make_room(newest: Path) -> None:
    """Remove the folders that were used longest ago, as far as all take too much; open files keep theirs."""
    ages, sizes = {}, {}
    for folder in newest.parent.iterdir():
        with suppress(OSError):  # another process may remove it
            ages[folder] = folder.stat().st_mtime_ns
            sizes[folder] = sum(path.stat().st_size for path in folder.rglob("*"))
    taken = sizes.pop(newest, 0)
    for folder in sorted(sizes, key=ages.__getitem__, reverse=True):
        taken += sizes[folder]
        if taken > _MOST:
            shutil.rmtree(folder, ignore_errors=True)
            logger.info(
                "the tokens in %s, which were not used for long, are removed: %s holds %.0f MB at the most",
                folder,
                newest.parent,
                _MOST / 1e6,
            )
