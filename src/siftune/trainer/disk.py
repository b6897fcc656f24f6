"""Faults of the disk while a run writes to its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from siftune.errors import TrainingError


@contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one sentence.

    Raises:
        TrainingError: Something in the block could not be written below `folder`.
    """
    try:
        yield
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise TrainingError(
            f"Writing to {folder} failed: {reason}. Free some space or choose another disk with --out; complete "
            "checkpoints there are intact, and --resume continues from the newest."
        ) from error


def _disk_reason(error: Exception) -> str | None:
    """Why writing failed, or None where the error is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    # torch.save names its own code, not the cause
    torch_words = ("inline_container.cc", "iostream error")
    return "a file could not be written to its end" if any(words in str(error) for words in torch_words) else None
