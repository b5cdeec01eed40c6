"""Listening to llama.cpp's log: its calls say only that they failed, the reasons are there."""

from __future__ import annotations

import ctypes
import re
from types import TracebackType

import llama_cpp

_ERROR, _CONTINUED = 4, 5  # ggml_log_level in ggml.h
_USELESS = re.compile(r"failed to load model$|failed to initialize the context", re.IGNORECASE)


class LlamaLog:
    """Within a ``with`` statement: the error lines that llama.cpp logs, which still go where they went before.

    The log callback is one for the process, so only one of these may be in use at a time.

    Args:
        errors_only: warnings and notices go nowhere. llama-cpp-python's own filter lets warnings pass as errors: its level numbers are old.
    """

    def __init__(self, *, errors_only: bool = False) -> None:
        self.errors: list[str] = []
        self._errors_only = errors_only
        self._level = 0
        self._earlier = llama_cpp.llama_log_callback()
        self._earlier_data = ctypes.c_void_p()
        self._callback = llama_cpp.llama_log_callback(self._listen)

    def __enter__(self) -> LlamaLog:
        llama_cpp.llama_log_get(ctypes.byref(self._earlier), ctypes.byref(self._earlier_data))
        llama_cpp.llama_log_set(self._callback, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        llama_cpp.llama_log_set(self._earlier, self._earlier_data)

    def _listen(self, level: int, line: bytes, _: object) -> None:
        self._level = self._level if level == _CONTINUED else level
        if self._level == _ERROR:
            self.errors.append(line.decode("utf-8", "replace").strip())
        if self._earlier and (self._level == _ERROR or not self._errors_only):
            self._earlier(level, line, self._earlier_data)

    @property
    def reason(self) -> str:
        """What went wrong first, without the name of the function that said so; "" when nothing was logged."""
        reasons = [re.sub(r"^\w+: (error loading model: )?", "", line) for line in self.errors]
        return next((reason for reason in reasons if reason and not _USELESS.search(reason)), "")
