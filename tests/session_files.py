"""Session files taken apart and put together again with checksums that are right, for the tests that forge them (native/session/format.h)."""

from __future__ import annotations

import json
import struct
from typing import Any

from gearcpp import native

HEAD = struct.Struct("<8sII")
SECTION = struct.Struct("<IIQ")
NOTE, STATE, TENSOR, EXTRA, LEARNED, END = 1, 2, 3, 4, 5, 0


def _sum(data: bytes) -> bytes:
    return struct.pack("<Q", native.lib.gear_checksum(native.ffi.from_buffer(data), len(data)))


def take_apart(data: bytes) -> list[tuple[int, bytes]]:
    """Kind and payload of each section, the end included."""
    at, sections = HEAD.size + 8, []
    while at < len(data):
        kind, _, size = SECTION.unpack_from(data, at)
        at += SECTION.size
        sections.append((kind, data[at : at + size]))
        at += size + 8
    return sections


def put_together(sections: list[tuple[int, bytes]], version: int = 1, magic: bytes = b"GEARSESS") -> bytes:
    """A file of these sections."""
    head = HEAD.pack(magic, version, 0)
    parts = [head, _sum(head)]
    for kind, payload in sections:
        whole = SECTION.pack(kind, 0, len(payload)) + payload
        parts += [whole, _sum(whole)]
    return b"".join(parts)


def with_note(data: bytes, change: Any) -> bytes:
    """The same file with another note: ``change`` is a mapping of what to change in it, or the new note as bytes."""
    sections = take_apart(data)
    if not isinstance(change, bytes):
        change = json.dumps({**json.loads(sections[0][1]), **change}).encode()
    return put_together([(NOTE, change), *sections[1:]])
