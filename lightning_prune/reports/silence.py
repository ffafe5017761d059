"""Libraries that talk where nobody has asked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silence(name: str) -> Iterator[None]:
    """No Python warnings, and nothing below an error from one logger.

    Args:
        name: of the logger.

    >>> with silence("some.library"):
    ...     logging.getLogger("some.library").warning("not heard")
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
