"""Cache of tokens: a folder for each set of rows and tokenizer.

    CACHE/tokens/KEY/
      tokens.arrow   the columns, in Arrow's stream format
      about.json     errors of rows, the number of cut rows, and the hash of the other file

KEY is a hash of the rows' texts, of the tokenizer, its chat template and special tokens, of the settings, and of the
versions of the libraries that tokenise. The origin of a row is not part of it. A damaged folder is replaced. If a
folder cannot be written, training continues without. All folders together take at most 4 GB: the least recently used
are removed first (ours), and the newest stays, whatever its size. Files are read as Arrow and JSON, and never run
code.
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
from siftune.data.encode import use_template
from siftune.data.rows import Row, row_texts
from siftune.data.tokens import Form, Tokens, tokens_of
from siftune.models.smollm2 import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LAYOUT = 1  # of the files, and of what they hold
_FROM = 2000  # least number of rows for a file
_MOST = 4 * 10**9  # bytes of all folders
_ARROW, _ABOUT = "tokens.arrow", "about.json"


def cached_tokens(rows: Sequence[Row], form: Form, progress: Progress | None = None) -> Tokens:
    """Tokenise rows as `tokens_of`, or read their tokens from the cache.

    The tokens of many rows stay in the cache, and the table is a view of the file there.

    Args:
        rows: at least one.
        form: how.
        progress: receives the number of tokenised rows.

    Raises:
        InputError: as `tokens_of`.
    """
    key = _key(rows, form) if len(rows) >= _FROM else None
    if key is None:
        return tokens_of(rows, form, progress)
    folder = cache_root() / "tokens" / key
    tokens = _read(folder)
    if tokens is not None:
        with suppress(OSError):
            os.utime(folder)  # most recently used
        logger.info("tokens of %d rows are in %s", len(rows), folder)
        return tokens
    tokens = tokens_of(rows, form, progress)
    if not _write(folder, tokens):
        return tokens
    _make_room(folder)
    return _read(folder) or tokens


def _key(rows: Sequence[Row], form: Form) -> str | None:
    """Hash everything that determines the tokens; None if the tokenizer cannot be identified."""
    use_template(form.template, form.tokenizer)  # a part of the tokenizer's identity
    tokenizer = _identity(form.tokenizer)
    if tokenizer is None:
        return None
    versions = [version(name) for name in ("transformers", "tokenizers", "jinja2")]
    options = [form.max_length, "chat" if isinstance(form.template, Path) else form.template, form.completion_only]
    digest = hashlib.sha256(json.dumps([_LAYOUT, versions, options, tokenizer]).encode())
    for row in row_texts(rows):
        digest.update(len(row).to_bytes(8, "big") + row)
    return digest.hexdigest()[:32]


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """Describe a tokenizer of the tokenizers library as text; None for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    template = json.dumps(tokenizer.chat_template)
    today = str(date.today()) if "strftime_now" in template else ""  # some templates write the date
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    splits = str(getattr(tokenizer, "split_special_tokens", None))
    return [kind, backend.to_str(), template, repr(tokenizer.special_tokens_map), splits, today]


def _read(folder: Path) -> Tokens | None:
    """Read a folder; None if there is none, or it is damaged."""
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
        logger.warning("the cached tokens in %s are damaged (%s); the rows are tokenised again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write(folder: Path, tokens: Tokens) -> bool:
    """Write a folder beside its place and move it there; False, with a warning, if that fails."""
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
    """Move a folder's files to their place, unless another process was faster."""
    complete = beside / "complete"
    complete.mkdir(mode=0o700)
    for name in (_ARROW, _ABOUT):
        os.replace(beside / name, complete / name)
    try:
        os.rename(complete, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _make_room(newest: Path) -> None:
    """Remove the least recently used folders beyond the limit; open files stay readable."""
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
                "removed the least recently used tokens in %s: %s holds at most %.0f MB",
                folder,
                newest.parent,
                _MOST / 1e6,
            )
