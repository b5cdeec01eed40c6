"""Text files, as perplexity, calibration and tasks read them."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import DataError


def read_text(path: str | os.PathLike[str]) -> bytes:
    """A text file as UTF-8, without the newline at its very end (which llama-perplexity drops, too).

    Raises:
        DataError: it is missing, unreadable, empty or not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give a text file") from error
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from error
    if not data.strip():
        raise DataError(f"{path} is empty: there is nothing to score")
    return data[:-1] if data.endswith(b"\n") else data
