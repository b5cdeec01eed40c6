"""`gearcpp serve`: llama.cpp's server with a GEAR cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gearcpp.cache.budget import parse_size
from gearcpp.cli import _options as options
from gearcpp.cli import app
from gearcpp.cli._console import mib, notice
from gearcpp.cli._model import DEFAULT_CTX, default_threads, resolve_model
from gearcpp.errors import ConfigError
from gearcpp.model_info import read_model_info

if TYPE_CHECKING:
    from gearcpp.server.model import Model
    from gearcpp.server.settings import ServerSettings

_SERVER = "Server"


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Listen here.", rich_help_panel=_SERVER)] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N", help="0: any free one.", rich_help_panel=_SERVER)] = 8080,
    parallel: Annotated[int, typer.Option("-np", "--parallel", min=1, metavar="N", help="Slots: requests decoded together.", rich_help_panel=_SERVER)] = 4,
    queue: Annotated[int, typer.Option("--queue", min=0, metavar="N", help="Requests that may wait; more get 429.", rich_help_panel=_SERVER)] = 64,
    kv_budget: Annotated[
        str | None, typer.Option("--kv-budget", metavar="SIZE", help="Most memory of all slots' caches, such as 4GiB.", rich_help_panel=_SERVER)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", envvar="GEARCPP_API_KEY", help="What clients must send.", rich_help_panel=_SERVER)
    ] = None,
    alias: Annotated[str | None, typer.Option("-a", "--alias", metavar="NAME", help="Model's name; default: its file's.", rich_help_panel=_SERVER)] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Embed, too: loads the model a second time.", rich_help_panel=_SERVER)] = False,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", metavar="NAME", help="In place of the model's own, such as chatml.", rich_help_panel=_SERVER)
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
    """Serve OpenAI's API (needs the extra: pip install "gearcpp\\[server]") by llama.cpp's server. Its options that are not here go behind --."""
    try:
        from gearcpp.server.app import create_app, run
        from gearcpp.server.options import from_command_line
        from gearcpp.server.settings import ModelSettings, ServerSettings, read_config
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise ConfigError(f"the server's packages are missing ({name}): pip install 'gearcpp[server]'") from error

    if config:
        if context.args:
            raise ConfigError(f"--config has all settings: put {context.args[0]!r} under a model's options there")
        server, models = read_config(config)
    else:
        server = ServerSettings(host=host, port=port, max_queue=queue, api_key=api_key, max_body_bytes=max_body * 1024, cors_origins=cors_origin or [])
        path = resolve_model(model, hf)
        trained = read_model_info(path).n_ctx_train
        n_ctx = min(trained, DEFAULT_CTX) if ctx_size is None else ctx_size or trained
        first = ModelSettings(
            model=str(path),
            model_alias=alias or path.stem,
            kv_type=kv,
            n_ctx=n_ctx,
            parallel=parallel,
            kv_budget=parse_size(kv_budget, "--kv-budget") if kv_budget else None,
            n_threads=threads or default_threads(),
            chat_template=chat_template,
            verbose=verbose,
            options={**from_command_line(context.args), **({"swa-full": True} if swa_full else {})},
        )
        models = [first]
        if embeddings:  # the same model once more; its cache is emptied for each batch, so there is nothing to compress
            name, n_cell = f"{first.name}-embeddings", min(trained, n_ctx, 2048)
            models.append(replace(first, model_alias=name, n_ctx=n_cell, kv_type="f16", kv_budget=None, embedding=True, options={}))
    _warn(server)
    application = create_app(server, models)
    for served in application.state.models.values():
        notice(_line(served))
    run(application, server, on_start=lambda url: notice(f"listening on {url}/v1"), log_level="info" if verbose else "warning")


def _warn(server: ServerSettings) -> None:
    from gearcpp.server.gate import LOOPBACK

    if server.host not in LOOPBACK and not server.api_key:
        notice(f"note: anyone who reaches {server.host}:{server.port} can use this server; --api-key asks for a key")
    if server.api_key and not server.ssl_certfile and server.host not in LOOPBACK:
        notice("note: the API key crosses the network in the clear; put a proxy with TLS in front, or set ssl_certfile and ssl_keyfile in --config")


def _line(served: Model) -> str:
    """What was loaded."""
    settings, total = served.settings, served.kv_stats()["total"]
    if settings.embedding:
        return f"{served.name} | embeddings"
    slots = f"{'each of ' if served.kv_type.gear else ''}{settings.parallel} slots"
    memory = f"KV {mib(total['bytes_used'])}, when full {mib(total['bytes'])} (f16: {mib(total['bytes_f16'])})"
    return f"{served.name} | {served.kv_type.name} | context {settings.n_ctx} for {slots} | {memory}"
