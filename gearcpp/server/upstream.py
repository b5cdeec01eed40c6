"""One request to llama.cpp's server, over a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import h11

_READ = 65536
_OF_A_CONNECTION = (b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"server")  # not of what is answered


class UpstreamError(Exception):
    """The model's process went away, or does not talk HTTP."""


class Answer:
    """An answer whose head is there.

    Attributes:
        status: HTTP's.
        headers: without those that are this connection's, and without permissions for web pages, which are the gate's to give.
    """

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], state: h11.Connection, reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = [(name, value) for name, value in headers if name not in _OF_A_CONNECTION and not name.startswith(b"access-control-")]
        self._state = state
        self._reader = reader

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        while True:
            event = await _next(self._state, self._reader)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])


@asynccontextmanager
async def ask(path: Path, method: str, target: str, headers: list[tuple[str, str]] | None = None, body: bytes = b"") -> AsyncIterator[Answer]:
    """Send a request; whoever leaves the block before the body's end ends the work on it.

    Raises:
        UpstreamError: there is no server behind the socket any more.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError as error:
        raise UpstreamError(f"the model's process does not answer ({error.strerror})") from error
    try:
        state = h11.Connection(h11.CLIENT)
        own = [("Host", "localhost"), ("Connection", "close"), ("Content-Length", str(len(body)))]
        writer.write(state.send(h11.Request(method=method, target=target, headers=[*own, *(headers or [])])) or b"")
        writer.write((body and state.send(h11.Data(data=body))) or b"")
        state.send(h11.EndOfMessage())
        event = await _next(state, reader)
        while isinstance(event, h11.InformationalResponse):
            event = await _next(state, reader)
        assert isinstance(event, h11.Response)
        yield Answer(event.status_code, list(event.headers), state, reader)
    finally:
        writer.close()


async def _next(state: h11.Connection, reader: asyncio.StreamReader) -> h11.Event:
    try:
        while (event := state.next_event()) is h11.NEED_DATA:
            state.receive_data(await reader.read(_READ))
    except (OSError, h11.RemoteProtocolError) as error:
        raise UpstreamError("the model's process ended in the middle of an answer") from error
    if isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
        raise UpstreamError("the model's process ended in the middle of an answer")
    assert not isinstance(event, type)
    return event
