"""Answers of a long run, kept in a file as they come, so that a run that was stopped can go on (`gearcpp eval --resume`).

JSON lines: the settings of the run, then one line for each answer, {"cache": ..., "result": {...}}, in the order of the cases. A line that was cut off
when the process was killed is dropped and asked for again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ..errors import BusyError, ConfigError, DataError

Result = TypeVar("Result")


class RunLog:
    """The file of one run.

    Args:
        path: made if it is not there; its folder has to be.
        settings: what must not change between the parts of a run: text, numbers, null.

    Raises:
        BusyError: another process is writing it.
        ConfigError: it holds a run with other settings.
        DataError: it is no such file, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._found: dict[str, list[dict[str, Any]]] = {}
        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(dict(settings))
        except BlockingIOError as error:
            self.close()
            raise BusyError(f"{path} is being written by another run: wait for it, or name another file") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, which gives it free for other runs."""
        self._file.close()

    def results(self, cache: str, kind: type[Result]) -> list[Result]:
        """What the file had of a cache when it was opened, as objects of a dataclass. DataError if they are no such objects."""
        try:
            return [_restore(kind, record) for record in self._found.get(cache, [])]
        except (KeyError, TypeError) as error:
            raise DataError(f"{self.path} holds answers of another kind than {kind.__name__}: name another file") from error

    def add(self, cache: str, result: Any) -> None:
        """Write down one more answer of a cache, a dataclass. It is in the file when this returns, whatever happens to the process then."""
        self._write({"cache": cache, "result": asdict(result)})

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _read(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            records = [json.loads(line) for line in whole.splitlines()]
            for record in records[1:]:
                self._found.setdefault(record["cache"], []).append(record["result"])
            kept = records[0]["run"] if records else settings
            differing = [f"{name} {kept.get(name)}, not {settings.get(name)}" for name in {**kept, **settings} if kept.get(name) != settings.get(name)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.path} is not a run of gearcpp eval: name another file") from error
        if data and not records:  # the settings are written before anything else, in one piece
            raise DataError(f"{self.path} is not a run of gearcpp eval: name another file")
        if differing:
            raise ConfigError(f"{self.path} holds a run with other settings ({'; '.join(differing)}): take those, or name another file")
        self._file.truncate(len(whole))
        if not records:
            self._write({"run": settings})


def _restore(kind: type[Result], record: Any) -> Result:
    """The dataclass that `asdict` made a record of."""
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    if set(record) != {field.name for field in fields(kind)}:
        raise KeyError(kind.__name__)
    return kind(**{name: _restore(hints[name], value) if is_dataclass(hints[name]) else value for name, value in record.items()})
