"""Keeping other libraries' loggers from telling what would make a reader of ours look for a fault that is none."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let loggers tell errors alone while a block runs.

    Example:
        >>> with quiet("some.library"):
        ...     logging.getLogger("some.library").isEnabledFor(logging.WARNING)
        False
        >>> logging.getLogger("some.library").isEnabledFor(logging.WARNING)
        True
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
