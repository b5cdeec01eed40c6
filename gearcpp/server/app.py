"""The application: llama-cpp-python's routes over `GearProxy`, behind the gate, with /health and /metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
import llama_cpp.server.app as upstream
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import gearcpp

from .errors import describe
from .gate import LOOPBACK, Gate
from .metrics import Metrics
from .proxy import GearProxy
from .settings import GearModelSettings, GearServerSettings

_SPARE_THREADS = 8  # beside one for each request that waits for its tokens


def create_app(server: GearServerSettings, models: list[GearModelSettings]) -> FastAPI:
    """Load the models and make the application. One for each process: llama-cpp-python's routes find settings and models in their module.

    Raises:
        GearError: a model cannot be loaded, or settings are wrong.
    """
    server.check()
    proxy = GearProxy(models)
    counts: Counter[tuple[str, int]] = Counter()
    metrics = Metrics(proxy.loaded, counts)
    n_parallel = sum(model.parallel for model in models if not model.embedding) or 1
    max_requests = n_parallel + server.max_queue

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = max_requests + _SPARE_THREADS
        yield
        proxy.free()

    app = FastAPI(title="gearcpp", version=gearcpp.__version__, root_path=server.root_path, lifespan=lifespan)
    app.state.proxy = proxy
    _serve_models(app, server, proxy)

    @app.get("/health", tags=["Operation"])
    @app.get("/v1/health", include_in_schema=False)
    async def health() -> Response:
        """Whether requests will be answered. It does not wait for a model."""
        is_well = all(model.scheduler.alive for model in proxy.loaded.values() if model.scheduler)
        return JSONResponse({"status": "ok" if is_well else "a scheduler has stopped"}, 200 if is_well else 503)

    @app.get("/metrics", tags=["Operation"])
    async def read_metrics() -> Response:
        """For Prometheus. It does not wait for a model."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(
        Gate,
        api_key=server.api_key,
        is_private=server.host in LOOPBACK and not server.api_key,
        max_body_bytes=server.max_body_bytes,
        max_requests=max_requests,
        counts=counts,
    )
    if server.cors_origins:
        is_any = "*" in server.cors_origins
        app.add_middleware(
            CORSMiddleware, allow_origins=server.cors_origins, allow_credentials=not is_any, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


def _serve_models(app: FastAPI, server: GearServerSettings, proxy: GearProxy) -> None:
    """Include llama-cpp-python's routes.

    They serve one request at a time, by two locks; ours take their turn in the gate and in the scheduler, and what needs no turn does not wait.
    """
    upstream.set_server_settings(server)
    upstream._llama_proxy = proxy
    upstream.llama_outer_lock = upstream.llama_inner_lock = _NoLock()  # type: ignore[assignment]
    if server.disable_ping_events:
        upstream.set_ping_message_factory(bytes)
    router = APIRouter(route_class=_Route)
    for route in upstream.router.routes:
        assert isinstance(route, APIRoute)
        names = ("methods", "response_model", "responses", "dependencies", "tags", "summary", "description", "include_in_schema")
        router.add_api_route(route.path, route.endpoint, **{name: getattr(route, name) for name in names})
    app.include_router(router)


class _Route(APIRoute):
    """A route whose exceptions become answers in the form of OpenAI's API."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                return await _answer_error(request, error)

        return handled


async def _answer_error(request: Request, error: Exception) -> Response:
    status, body = describe(error)
    return JSONResponse(body, status, getattr(error, "headers", None))


class _NoLock:
    """In place of an anyio.Lock."""

    async def acquire(self) -> None: ...

    def release(self) -> None: ...

    def locked(self) -> bool:
        return False


def run(app: FastAPI, server: GearServerSettings, *, on_start: Callable[[str], Any] = lambda url: None, log_level: str = "warning") -> None:
    """Serve until SIGINT or SIGTERM. Answers under way get a few seconds to end.

    Args:
        app: of `create_app`.
        server: where to listen.
        on_start: told the address once connections are taken.
        log_level: uvicorn's.

    Raises:
        GearError: the address cannot be listened on.
    """
    import socket

    import uvicorn

    from gearcpp.errors import GearError

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit and sockets:
                host, port = sockets[0].getsockname()[:2]
                on_start(f"http{'s' if server.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}")

    config = uvicorn.Config(
        app,
        log_level=log_level,
        ssl_keyfile=server.ssl_keyfile,
        ssl_certfile=server.ssl_certfile,
        timeout_graceful_shutdown=5,
    )
    try:
        family, _, _, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, reuse_port=False)
    except OSError as error:
        raise GearError(f"cannot listen on {server.host}:{server.port}: {error.strerror or error}; choose another --port or --host") from error
    with listener:
        Server(config).run(sockets=[listener])
