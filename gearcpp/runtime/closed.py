"""What stands in the place of an object that was freed."""

from __future__ import annotations

from typing import Any

from ..errors import ClosedError


class _Closed:
    """Stands in for what was freed: every use of it is an error instead of a crash."""

    def error(self) -> ClosedError:
        return ClosedError("this Llama was closed; make a new one")

    def __getattr__(self, name: str) -> Any:
        raise self.error()


CLOSED: Any = _Closed()
