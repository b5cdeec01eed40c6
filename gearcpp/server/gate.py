"""What a request passes before llama-cpp-python's routes see it: host name, API key, size, a place in the queue, and a look at the body.

It also tells those who work for a client when it goes, and makes an error that comes before the first piece of a stream an HTTP error: the routes send
the headers of a stream before they call the model.
"""

from __future__ import annotations

import hmac
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import errors, requests
from .client import Client, current_client

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PUBLIC = ("/health", "/v1/health")  # no API key: load balancers ask here


class Gate:
    """ASGI middleware.

    Args:
        app: what lies behind.
        api_key: what clients must send as a bearer token; None: nothing.
        is_private: only requests that name this machine itself as their host are taken. A web page whose own name was made to point here (DNS rebinding)
            would otherwise be of the same origin as this server.
        max_body_bytes: of a request; larger ones are answered with 413.
        max_requests: requests to generating paths that are in work or wait; any more are answered with 429.
        counts: requests answered, by path and status; counted here.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, is_private: bool, max_body_bytes: int, max_requests: int, counts: Counter[tuple[str, int]]
    ) -> None:
        self._app = app
        self._api_key = api_key
        self._is_private = is_private
        self._max_body_bytes = max_body_bytes
        self._max_requests = max_requests
        self._counts = counts
        self._n_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = Headers(scope=scope)
        sender = _Sender(send)
        try:
            if self._is_private and _host(headers) not in LOOPBACK:
                await sender.refuse(403, f"this server is private to its machine: ask for localhost, not {_host(headers)!r}, or start it with an API key")
                return
            if self._api_key and path not in PUBLIC and not _has_key(headers, self._api_key):
                await sender.refuse(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'", {"WWW-Authenticate": "Bearer"})
                return
            data = await self._read(headers, receive)
            if data is None:
                await sender.refuse(413, f"the request is larger than {self._max_body_bytes} bytes")
                return
            if scope["method"] == "POST" and path in requests.GENERATING:
                await self._generate(path, scope, data, receive, sender)
            else:
                await self._app(scope, _Replay(data, receive), sender)
                await sender.finish()
        except _Disconnected:
            return
        finally:
            if sender.status:
                self._counts[path if path in requests.GENERATING else "other", sender.status] += 1

    async def _generate(self, path: str, scope: Scope, data: bytes, receive: Receive, sender: _Sender) -> None:
        if self._n_requests >= self._max_requests:
            await sender.refuse(429, f"{self._n_requests} requests are in work or waiting, no more are taken: try again later", {"Retry-After": "1"})
            return
        self._n_requests += 1
        client = Client()
        token = current_client.set(client)
        try:
            request = requests.prepare(path, data)
            replay = _Replay(request.body, receive)
            if request.wants_usage:
                sender.last_event = lambda: _last_event(path, client)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(replay.watch, client)
                try:
                    await self._app(scope, replay, sender)
                    await sender.finish()
                except Exception as error:
                    await sender.fail(error)
                tasks.cancel_scope.cancel()
        except Exception as error:
            await sender.fail(error)
        finally:
            client.go()
            current_client.reset(token)
            self._n_requests -= 1

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, or None when it is too large; what is too large is read to its end without being kept, so that the client hears why."""
        length = headers.get("content-length", "")
        chunks: list[bytes] = []
        n_bytes, is_over = 0, length.isdigit() and int(length) > self._max_body_bytes
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            chunk = message.get("body", b"")
            n_bytes += len(chunk)
            is_over = is_over or n_bytes > self._max_body_bytes
            if is_over:
                chunks.clear()
                if n_bytes > 8 * self._max_body_bytes:  # it does not want to hear
                    return None
            else:
                chunks.append(chunk)
            if not message.get("more_body"):
                return None if is_over else b"".join(chunks)


class _Disconnected(Exception):
    """The client went before its request was there."""


class _Replay:
    """A receive that gives a body already read, and afterwards what the connection says."""

    def __init__(self, data: bytes, receive: Receive) -> None:
        self._messages: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]
        self._receive = receive
        self._watched = False
        self._gone = anyio.Event()

    async def __call__(self) -> Message:
        if self._messages:
            return self._messages.pop()
        if not self._watched:
            return await self._receive()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def watch(self, client: Client) -> None:
        """Tell the client's workers, and whoever calls this receive, when the connection closes."""
        self._watched = True
        while (await self._receive())["type"] != "http.disconnect":
            pass
        client.go()
        self._gone.set()


class _Sender:
    """A send that keeps two things of an event stream back: its headers until there is a piece, its end until the application is through without error."""

    def __init__(self, send: Send) -> None:
        self.status = 0  # that was sent
        self._send = send
        self._start: Message | None = None
        self._end: Message | None = None
        self._is_stream = False
        self.last_event: Callable[[], bytes] = bytes  # what to send before the mark at a stream's end

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            self._start = message
        elif not self._is_stream or message.get("body"):
            if self._is_stream and message["body"].startswith(b"data: [DONE]"):
                message = {**message, "body": self.last_event() + message["body"]}
            await self._pass(message)
        elif not message.get("more_body"):
            self._end = message

    async def finish(self) -> None:
        """The application is through."""
        if self._end:
            end, self._end = self._end, None
            await self._pass(end)

    async def _pass(self, message: Message) -> None:
        if self._start:
            start, self._start = self._start, None
            self.status = start["status"]
            await self._send(start)
        await self._send(message)

    async def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        """Answer with an error of ours."""
        await self._answer(status, errors.body(status, message), headers)

    async def fail(self, error: Exception) -> None:
        """Answer with what an exception says; in a stream that has begun, as its last event."""
        status, body = errors.describe(error)
        if not self.status:
            await self._answer(status, body)
        elif self._is_stream:
            await self._send({"type": "http.response.body", "body": f"data: {json.dumps(body)}\n\n".encode(), "more_body": False})

    async def _answer(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.status = status
        response = JSONResponse(body, status, headers)
        await self._send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
        await self._send({"type": "http.response.body", "body": response.body})


def _last_event(path: str, client: Client) -> bytes:
    """The tokens that a stream took, as its route would send them if it knew of that."""
    event = client.last_event
    if event and path == requests.CHAT:
        event = {**event, "id": f"chat{event['id']}", "object": "chat.completion.chunk"}
    return f"data: {json.dumps(event)}\n\n".encode() if event else b""


def _host(headers: Headers) -> str:
    """The host name that a request is for, without its port."""
    name = headers.get("host", "").lower()
    return name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]


def _has_key(headers: Headers, api_key: str) -> bool:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), api_key.encode())
