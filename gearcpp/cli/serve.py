"""`gearcpp serve`: a server of OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gearcpp.cli import _options as options
from gearcpp.cli import app
from gearcpp.cli._console import notice
from gearcpp.cli._model import DEFAULT_CTX, default_threads, resolve_model, silence_llama_log
from gearcpp.errors import ConfigError
from gearcpp.model_info import read_model_info

if TYPE_CHECKING:
    from gearcpp.server.settings import GearServerSettings

_SERVER = "Server"


@app.command()
def serve(
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Listen here.", rich_help_panel=_SERVER)] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N", help="0: any free one.", rich_help_panel=_SERVER)] = 8080,
    parallel: Annotated[
        int, typer.Option("-np", "--parallel", min=1, metavar="N", help="Requests decoded together; they share the context.", rich_help_panel=_SERVER)
    ] = 4,
    queue: Annotated[int, typer.Option("--queue", min=0, metavar="N", help="Requests that may wait; more get 429.", rich_help_panel=_SERVER)] = 64,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", envvar="GEARCPP_API_KEY", help="What clients must send.", rich_help_panel=_SERVER)
    ] = None,
    alias: Annotated[str | None, typer.Option("-a", "--alias", metavar="NAME", help="Model's name; default: its file's.", rich_help_panel=_SERVER)] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Embed, too: loads the model a second time.", rich_help_panel=_SERVER)] = False,
    chat_format: Annotated[
        str | None, typer.Option("--chat-format", metavar="NAME", help="Chat format for a model without a template, as chatml.", rich_help_panel=_SERVER)
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", min=1, metavar="KIB", help="Largest request in KiB.", rich_help_panel=_SERVER)] = 8192,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", metavar="ORIGIN", help="Web pages that may use it; repeat.", rich_help_panel=_SERVER)
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="All settings from JSON or YAML instead.", rich_help_panel=_SERVER)
    ] = None,
    model: options.ModelFile = None,
    hf: options.HfRepo = None,
    kv: options.KvType = "gear",
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    swa_full: options.SwaFull = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve OpenAI's API (needs the extra: pip install "gearcpp\\[server]"). Requests are decoded together in one compressed cache."""
    try:
        from gearcpp.server.app import create_app, run
        from gearcpp.server.settings import GearModelSettings, GearServerSettings, checked, read_config
    except ModuleNotFoundError as error:
        raise ConfigError(f"the server's packages are missing ({error.name}): pip install 'gearcpp[server]'") from error

    if config:
        server, models = read_config(config)
    else:
        values = {"host": host, "port": port, "max_queue": queue, "api_key": api_key, "max_body_bytes": max_body * 1024, "cors_origins": cors_origin or []}
        server = checked(GearServerSettings, values)
        path = resolve_model(model, hf)
        trained = read_model_info(path).n_ctx_train
        common = {"model": str(path), "n_threads": threads or default_threads(), "n_threads_batch": threads or default_threads(), "verbose": verbose}
        if swa_full:
            common["swa_full"] = True
        n_ctx = min(trained, DEFAULT_CTX) if ctx_size is None else ctx_size or trained
        first = {"model_alias": alias or path.stem, "kv_type": kv, "n_ctx": n_ctx, "parallel": parallel, "chat_format": chat_format}
        models = [checked(GearModelSettings, {**common, **first})]
        if embeddings:
            models.append(checked(GearModelSettings, {**common, **_embedder(first, min(trained, n_ctx))}))
    _warn(server)
    if not any(settings.verbose for settings in models):
        silence_llama_log()
    application = create_app(server, models)
    for line in _lines(application.state.proxy.loaded):
        notice(line)
    run(application, server, on_start=lambda url: notice(f"listening on {url}/v1"), log_level="info" if verbose else "warning")


def _embedder(first: dict[str, Any], n_ctx: int) -> dict[str, Any]:
    """The same model as one that embeds. Its cache is emptied for each batch: nothing to compress."""
    n_batch = min(n_ctx, 2048)
    return {
        "model_alias": f"{first['model_alias']}-embeddings",
        "kv_type": "f16",
        "n_ctx": n_batch,
        "n_batch": n_batch,
        "n_ubatch": n_batch,
        "embedding": True,
    }


def _warn(server: GearServerSettings) -> None:
    from gearcpp.server.gate import LOOPBACK

    if server.host not in LOOPBACK and not server.api_key:
        notice(f"note: anyone who reaches {server.host}:{server.port} can use this server; --api-key asks for a key")
    if server.api_key and not server.ssl_certfile and server.host not in LOOPBACK:
        notice("note: the API key crosses the network in the clear; put a proxy with TLS in front, or set ssl_certfile and ssl_keyfile in --config")


def _lines(models: dict[str, Any]) -> list[str]:
    from gearcpp.cli._report import cache_line

    return [
        f"{name} | {model.kv_type.name} | context {model.n_ctx()} for {model.n_parallel} at once | {cache_line(model)}"
        if model.scheduler
        else f"{name} | embeddings of up to {model.n_batch} tokens"
        for name, model in models.items()
    ]
