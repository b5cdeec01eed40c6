"""What a request passes before llama.cpp's server sees it: host name and origin, API key, size, a look at the body, a place in the queue.

What lies behind is trusted to answer right, not to guard itself: any page may talk to it, and it takes as many requests as come.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import errors, forced
from .errors import RequestError
from .model import Model
from .upstream import Answer, UpstreamError, ask
from .whole import can_be_streamed, joined

Finish = Callable[[bytes], Response]  # of a whole answer's JSON

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PUBLIC = ("/health", "/v1/health")  # no API key: load balancers ask here
# Paths whose requests take their turn, without /v1; all others answer at once.
_ANSWERS = ("/completion", "/completions", "/chat/completions", "/responses", "/messages", "/infill", "/systemone", "/audio/transcriptions")
_EMBEDDINGS = ("/embedding", "/embeddings", "/rerank", "/reranking")
_CHATS = ("/chat/completions", "/responses", "/messages", "/apply-template")
_JSON = (*_ANSWERS, *_EMBEDDINGS, "/apply-template", "/tokenize", "/detokenize")  # whose bodies are JSON objects, and may name a model
_PASSED_ON = ("content-type", "accept", "accept-encoding")
# What llama.cpp's server would leave out without a word though the answer would be another.
_REFUSED = {
    "suffix": "ask /infill for what stands between two texts",
    "echo": "put the prompt before the answer",
    "best_of": "take n and choose",
    "min_tokens": "ignore_eos keeps an answer from ending before max_tokens",
}


class Gate:
    """ASGI application: requests for models go to their processes, the others to ``app``.

    Args:
        app: what answers /health, /metrics and /v1/models.
        models: by name; the first is meant by a name that is not known.
        api_key: what clients must send as a bearer token; None: nothing.
        is_private: only requests that name this machine itself as their host are taken, and none of a web page of elsewhere. A page whose own name was
            made to point here (DNS rebinding) would otherwise be of the same origin as this server.
        max_body_bytes: of a request; larger ones are answered with 413.
        max_queue: requests to a model beyond those that it works on; any more are answered with 429.
        origins: web pages that may use the server.
        counts: requests answered, by path and status; counted here.
        n_requests: those in work or waiting, by model; counted here, too.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        models: Mapping[str, Model],
        api_key: str | None,
        is_private: bool,
        max_body_bytes: int,
        max_queue: int,
        origins: list[str],
        counts: Counter[tuple[str, int]],
        n_requests: Counter[str],
    ) -> None:
        self._app = app
        self._models = models
        self._api_key = api_key
        self._is_private = is_private
        self._max_body_bytes = max_body_bytes
        self._max_queue = max_queue
        self._origins = origins
        self._counts = counts
        self._n_requests = n_requests
        self._slots = {name: asyncio.Semaphore(model.settings.parallel) for name, model in models.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        kind = path.removeprefix("/v1")
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def fail(error: RequestError) -> None:
            if not status:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, counted)
            else:  # of a stream, whose last event it is
                await send({"type": "http.response.body", "body": f"data: {json.dumps(error.body)}\n\n".encode(), "more_body": False})

        try:
            headers = Headers(scope=scope)
            self._check(path, headers)
            data = await self._read(headers, receive)
            if scope["method"] in ("GET", "HEAD") and kind in ("/health", "/metrics", "/models"):
                await self._app(scope, receive, counted)
            else:
                await self._work(scope, path, kind, data, receive, counted)
        except RequestError as error:
            await fail(error)
        except UpstreamError as error:
            await fail(RequestError(503, str(error)))
        except asyncio.CancelledError:
            await fail(RequestError(503, "the server stops"))
        except _Disconnected:
            return
        finally:
            if status:
                self._counts[path if kind in (*_ANSWERS, *_EMBEDDINGS) else "other", status] += 1

    def _check(self, path: str, headers: Headers) -> None:
        """Who may come in."""
        host, origin = _host(headers), headers.get("origin")
        if self._is_private and host not in LOOPBACK:
            raise RequestError(403, f"this server is private to its machine: ask for localhost, not {host!r}, or start it with an API key")
        own = origin and origin.partition("://")[2] == headers.get("host")
        if self._is_private and origin and not own and not {origin, "*"} & {*self._origins}:
            raise RequestError(403, f"pages of {origin} may not use this server: --cors-origin or an API key lets them")
        if self._api_key and path not in PUBLIC and not _has_key(headers, self._api_key):
            raise RequestError(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body; what is too large is read to its end without being kept, so that the client hears why."""
        length = headers.get("content-length", "")
        chunks: list[bytes] = []
        n_bytes, is_over, more = 0, length.isdigit() and int(length) > self._max_body_bytes, True
        while more and n_bytes <= 8 * self._max_body_bytes:  # one that sends still more does not want to hear
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            n_bytes += len(message.get("body", b""))
            is_over = is_over or n_bytes > self._max_body_bytes
            chunks = [] if is_over else [*chunks, message.get("body", b"")]
            more = message.get("more_body", False)
        if is_over:
            raise RequestError(413, f"the request is larger than {self._max_body_bytes} bytes")
        return b"".join(chunks)

    async def _work(self, scope: Scope, path: str, kind: str, data: bytes, receive: Receive, send: Send) -> None:
        """Pass a request on to its model."""
        query = scope["query_string"].decode("latin-1")
        name = next(iter(parse_qs(query).get("model", [])), None)
        headers = Headers(scope=scope)
        request, is_joined = None, False
        finish: Finish = _whole
        if scope["method"] == "POST" and kind in _JSON and not headers.get("content-type", "").startswith("multipart/"):
            request = _parsed(data)
            name = request["model"] if isinstance(request.get("model"), str) else name
        model = self._model(name, kind)
        if request is not None:
            _check_request(request, kind, model)
            if kind in _CHATS and request.get("tools") and request.get("tool_choice") != "none" and not await model.knows_tools():
                raise RequestError(400, "this model's chat template knows no tools: leave tools out, or start the server with a --chat-template that does")
            if functions := forced.demanded(request, kind):
                finish = _called(functions, request)
                request = {**forced.as_schema(request, functions), "stream": False, "stream_options": None}
            is_joined = can_be_streamed(request, kind)
            options = {"stream": True, "stream_options": {"include_usage": True}} if is_joined else {}
            data = json.dumps({**request, "model": model.name, **options}).encode()
        passed = [(name, headers[name]) for name in _PASSED_ON if name in headers]
        target = quote(path) + (f"?{query}" if query else "")
        work = _pass_on(model, scope["method"], target, passed, data, finish if is_joined else None, scope, send)
        if kind in (*_ANSWERS, *_EMBEDDINGS):
            await self._in_turn(model, work, receive)
        else:
            await _while_there(work, receive)

    async def _in_turn(self, model: Model, work: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Wait here for a slot: those who wait in llama.cpp's server and go, it misses only when it has begun with them."""
        n = self._n_requests[model.name]
        if n >= model.settings.parallel + self._max_queue:
            work.close()
            raise RequestError(429, f"{n} requests are in work or waiting, no more are taken: try again later", headers={"Retry-After": "1"})

        async def turn() -> None:
            try:
                async with self._slots[model.name]:
                    await work
            finally:
                work.close()

        self._n_requests[model.name] += 1
        try:
            await _while_there(turn(), receive)
        finally:
            self._n_requests[model.name] -= 1

    def _model(self, name: str | None, kind: str) -> Model:
        """The model that is meant. Embeddings go to the model that was loaded for them, whatever model is named."""
        named = self._models.get(name or "") or next(iter(self._models.values()))
        if kind in _EMBEDDINGS and not named.settings.embedding:
            named = next((model for model in self._models.values() if model.settings.embedding), named)
            if not named.settings.embedding:
                raise RequestError(400, "this server does not embed: start it with --embeddings")
        if kind in _ANSWERS and named.settings.embedding:
            raise RequestError(400, f"{named.name} embeds, and does nothing else")
        return named


class _Disconnected(Exception):
    """The client went before its request was there."""


async def _while_there(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do work for as long as the client waits for it."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _whole(answer: bytes) -> Response:
    return Response(answer, media_type="application/json")


def _called(functions: list[dict[str, Any]], request: dict[str, Any]) -> Finish:
    """What makes a call of the answer, in the form that the client asked for."""

    def finish(answer: bytes) -> Response:
        whole = forced.as_call(answer, functions)
        if not request.get("stream"):
            return JSONResponse(whole)
        options = request.get("stream_options")
        return Response(
            forced.as_stream(whole, has_usage=isinstance(options, dict) and bool(options.get("include_usage"))), media_type="text/event-stream"
        )

    return finish


async def _pass_on(
    model: Model, method: str, target: str, headers: list[tuple[str, str]], data: bytes, finish: Finish | None, scope: Scope, send: Send
) -> None:
    """Let llama.cpp's server answer.   finish: what becomes of an answer whose stream is joined; None: it is passed on as it comes."""
    async with ask(model.socket, method, target, headers, data) as answer:
        if answer.status >= 400:
            error = errors.translate(answer.status, await answer.read(), f"{method} {target.partition('?')[0]}")
            if reason := await model.reason(str(error)):
                raise RequestError(error.status, f"{error}: {reason}")
            raise error
        if finish:
            await finish(await joined(answer.chunks()))(scope, _nothing, send)
            return
        if not any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in answer.headers):
            whole = Response(await answer.read(), answer.status)
            whole.raw_headers = [*answer.headers, *((name, value) for name, value in whole.raw_headers if name == b"content-length")]
            await whole(scope, _nothing, send)
            return
        await _stream(answer, send)


async def _stream(answer: Answer, send: Send) -> None:
    """Pieces as they come."""
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    async for chunk in answer.chunks():
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        request = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise RequestError(400, "the body must be a JSON object")
    return request


def _check_request(request: dict[str, Any], kind: str, model: Model) -> None:
    """Refuse what llama.cpp's server would answer with 500, or answer as if it had not been asked for."""
    if kind in _CHATS and not model.has_template:
        raise RequestError(400, "this model has no chat template: start the server with --chat-template, such as chatml, or ask /v1/completions")
    if kind in ("/chat/completions", "/messages") and not (isinstance(request.get("messages"), list) and request["messages"]):
        raise RequestError(400, "messages must be a list of at least one message")
    if kind == "/completions" and "prompt" not in request:
        raise RequestError(400, "prompt is missing")
    if kind == "/detokenize":
        tokens = request.get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < model.n_vocab for token in tokens):
            raise RequestError(400, f"tokens must be a list of this model's tokens, 0 to {model.n_vocab - 1}")
    if kind in _EMBEDDINGS and request.get("dimensions") is not None:
        raise RequestError(400, "dimensions is not supported: the model's own number of dimensions is what there is")
    if kind not in _ANSWERS:
        return
    for name, instead in _REFUSED.items():
        if request.get(name) and not (name == "min_tokens" and request.get("ignore_eos")):
            raise RequestError(400, f"{name} is not supported: {instead}")
    if request.get("tool_choice") not in (None, "none", "auto") and not request.get("tools"):
        raise RequestError(400, "tool_choice asks for a tool, and there are no tools")
    stop = request.get("stop")
    if stop is not None and not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(text, str) for text in stop)):
        raise RequestError(400, "stop must be a string or a list of strings")
    for name in ("max_tokens", "max_completion_tokens"):
        if request.get(name) == 0:
            raise RequestError(400, f"{name} must be at least 1")
    bias = request.get("logit_bias")
    for token in bias if isinstance(bias, dict) else []:
        if token.lstrip("-").isdigit() and not 0 <= int(token) < model.n_vocab:
            raise RequestError(400, f"logit_bias names token {token}: this model has tokens 0 to {model.n_vocab - 1}")


def _host(headers: Headers) -> str:
    """The host name that a request is for, without its port."""
    name = headers.get("host", "").lower()
    return name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]


def _has_key(headers: Headers, api_key: str) -> bool:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    key = key if scheme.lower() == "bearer" else headers.get("x-api-key", "")  # as Anthropic's clients send it
    return hmac.compare_digest(key.strip().encode(), api_key.encode())
