"""From the bytes of tokens to text that can be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Text as it becomes certain.

    A token may end in the middle of a character, and what looks like ordinary text may be the beginning of a stop string: both are held back until they
    are decided.

    Args:
        stops: strings that end the text; they are not part of it.

    Attributes:
        length: characters decoded so far, those held back included.
        stopped: whether a stop string came; nothing is taken after it.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.length = 0
        self.stopped = False
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """Take the bytes of the next token; the text that is certain now."""
        return self._take(self._decoder.decode(data))

    def finish(self) -> str:
        """No token follows: the rest of the text. Of an unfinished character a replacement character is left."""
        certain = self._take(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return certain + rest

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        self.length += len(text)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self.length -= len(self._held) - min(found)
            certain, self._held = self._held[: min(found)], ""
            return certain
        n_held = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain = self._held[: len(self._held) - n_held]
        self._held = self._held[len(certain) :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of text that a stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
