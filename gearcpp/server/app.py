"""The application: the gate before the models' processes, with /health, /metrics and /v1/models of its own."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gearcpp.errors import ConfigError, GearError

from .gate import LOOPBACK, Gate
from .metrics import Metrics
from .model import Model
from .settings import ModelSettings, ServerSettings

_SECONDS_TO_ANSWER = 5  # after the server was told to stop


def create_app(server: ServerSettings, models: list[ModelSettings]) -> Starlette:
    """Load the models and make the application.

    Raises:
        GearError: a model cannot be loaded, or settings are wrong.
    """
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        raise ConfigError(f"two models have the same name: {', '.join(names)}; give them a model_alias each")
    loaded: dict[str, Model] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gearcpp-")))  # only its owner may enter it
        for settings in models:
            loaded[settings.name] = Model(settings, folder, settings.parallel + server.max_queue)
            stack.callback(loaded[settings.name].close)
        resources = stack.pop_all()
    counts: Counter[tuple[str, int]] = Counter()
    n_requests: Counter[str] = Counter()
    metrics = Metrics(loaded, counts, n_requests)

    async def health(request: Request) -> Response:
        """Whether every model will answer."""
        wells = await asyncio.gather(*(model.is_well() for model in loaded.values()))
        ill = [name for name, is_well in zip(loaded, wells, strict=True) if not is_well]
        return JSONResponse({"status": f"not answering: {', '.join(ill)}"}, 503) if ill else JSONResponse({"status": "ok"})

    async def read_metrics(request: Request) -> Response:
        """For Prometheus."""
        return Response(await metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def list_models(request: Request) -> Response:
        """All models by name."""
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "gearcpp"} for name in loaded]})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        resources.close()

    paths = {"/health": health, "/metrics": read_metrics, "/models": list_models}
    gate = Middleware(
        Gate,
        models=loaded,
        api_key=server.api_key,
        is_private=server.host in LOOPBACK and not server.api_key,
        max_body_bytes=server.max_body_bytes,
        max_queue=server.max_queue,
        origins=server.cors_origins,
        counts=counts,
        n_requests=n_requests,
    )
    is_any = "*" in server.cors_origins
    permissions = {"allow_origins": server.cors_origins, "allow_credentials": not is_any, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
    app = Starlette(
        routes=[Route(prefix + path, endpoint) for path, endpoint in paths.items() for prefix in ("", "/v1")],
        middleware=[*([Middleware(CORSMiddleware, **permissions)] if server.cors_origins else []), gate],  # type: ignore[arg-type]
        lifespan=lifespan,
    )
    app.state.models, app.state.close = loaded, resources.close
    return app


def run(app: Starlette, server: ServerSettings, *, on_start: Callable[[str], Any] = lambda url: None, log_level: str = "warning") -> None:
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
        timeout_graceful_shutdown=_SECONDS_TO_ANSWER,
    )
    try:
        try:
            family, _, _, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family, reuse_port=False)
        except OSError as error:
            raise GearError(f"cannot listen on {server.host}:{server.port}: {error.strerror or error}; choose another --port or --host") from error
        with listener:
            Server(config).run(sockets=[listener])
    finally:
        app.state.close()
