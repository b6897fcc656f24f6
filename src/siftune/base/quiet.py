"""Keeping other libraries' loggers from telling what would make a reader of ours look for a fault that is none."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


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


@contextmanager
def unsaid(name: str, beginning: str) -> Iterator[None]:
    """Keep a logger from telling one thing while a block runs: messages that begin so.

    Example:
        >>> with unsaid("some.library", "All is lost"):
        ...     logging.getLogger("some.library").warning("All is lost: nothing of yours")
    """
    logger, keep = logging.getLogger(name), partial(_begins_otherwise, beginning)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _begins_otherwise(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)
