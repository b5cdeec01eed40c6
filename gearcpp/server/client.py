"""The client behind a request, as far as the code that answers it has to know: whether it is still there, and what it wants to hear at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any


class Client:
    """Tells those who work for it when it goes.

    Attributes:
        last_event: what a stream ends with, the tokens that it took among it; set by those who work for the client, None before that.
    """

    def __init__(self) -> None:
        self.last_event: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._is_gone = False
        self._callbacks: list[Callable[[], None]] = []

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Call this once when the client goes; at once if it went already."""
        with self._lock:
            if not self._is_gone:
                self._callbacks.append(callback)
                return
        callback()

    def go(self) -> None:
        """The connection is closed, or the answer complete."""
        with self._lock:
            self._is_gone = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


# Set by the gate for each request, seen by whatever runs for it: tasks and threads take their context over.
current_client: ContextVar[Client | None] = ContextVar("current_client", default=None)
