"""A process with one model: llama.cpp's server on a Unix socket, with GEAR under it.

The gate talks HTTP to the socket. By the process's stdin and stdout it sends settings, then empty lines, each of which is answered with what the KV cache
holds. At the end of stdin the process ends, so that none outlives its gate, however that ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

from gearcpp import native
from gearcpp.cache.kv_type import LLAMA_CACHE_TYPES, normalize_kv_type
from gearcpp.errors import ConfigError, GearError
from gearcpp.model_info import file_fingerprint, read_model_info

from . import options
from .settings import ModelSettings
from .states import Packed

_LOG_ERRORS, _LOG_INFO = 1, 3  # llama.cpp's levels


def main() -> None:
    """Load what stdin says and serve until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: it is for the gate, which ends this process when answers are through
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer of ours
    request = json.loads(sys.stdin.readline())
    settings = ModelSettings(**request["model"])
    try:
        server, stats, states = _load(settings, request["socket"], request["requests"])
    except GearError as error:
        out.write(json.dumps({"error": str(error), "kind": type(error).__name__}) + "\n")
        sys.exit(1)
    out.write(json.dumps({"kv": stats()}) + "\n")
    for _ in sys.stdin:
        out.write(json.dumps({"kv": stats()}) + "\n")
    if states:
        states.close()
    del server


def _load(settings: ModelSettings, socket: str, n_requests: int) -> tuple[Any, Any, Any]:
    try:
        import xllamacpp
    except ImportError as error:
        raise ConfigError(f"xllamacpp cannot be imported ({error}): pip install 'gearcpp[server]'") from error
    import gearcpp.xllamacpp as gear

    params = _params(xllamacpp, settings)
    params.hostnames, params.port = [socket], 0
    params.n_threads_http = n_requests + 8  # each request that waits holds one; the others are for /health, /metrics and the like
    kv, states = normalize_kv_type(settings.cache), None
    if kv.gear:
        gear.use(params, kv)
        library, n_threads = ctypes.CDLL(xllamacpp.xllamacpp.__file__), settings.n_threads or os.cpu_count() or 1
        states = Packed(library, native.lib.gear_plugin_device(), _owner(settings), n_threads)
        if not states.works:
            params.cache_ram_mib = 0  # it would hold rows of f16, and code them again when they return
    else:
        params.cache_type_k, params.cache_type_v = (xllamacpp.ggml_type(LLAMA_CACHE_TYPES[name]) for name in (kv.type_k, kv.type_v))
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    options.put(params, settings.options)
    if params.slot_save_path:
        params.slot_save_path = os.path.join(params.slot_save_path, "")  # llama.cpp appends the file's name
    if states:
        states.limit = max(0, params.cache_ram_mib) << 20
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise GearError(f"llama.cpp cannot serve {settings.model}: {error}") from error
    return server, gear.kv_stats if kv.gear else lambda: None, states


def _owner(settings: ModelSettings) -> str:
    """What decides about keys and values: a slot file is for the same only."""
    kv = normalize_kv_type(settings.cache)
    options = {name: str(value) for name, value in sorted(settings.options.items()) if name.startswith(("rope", "yarn", "lora"))}
    return json.dumps([[file_fingerprint(path) for path in read_model_info(settings.model).files], kv.gear and kv.gear.to_text(), options])


def _params(xllamacpp: Any, settings: ModelSettings) -> Any:
    is_gear = normalize_kv_type(settings.cache).gear is not None
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = settings.model, {settings.name}
    # A slot's stream of a GEAR cache takes memory by what is in it, so each slot has the whole context. llama.cpp's own types take it all at once.
    params.n_parallel, params.kv_unified = settings.parallel, not is_gear
    params.n_ctx = settings.n_ctx * (settings.parallel if is_gear else 1)
    if settings.n_threads:
        params.cpuparams.n_threads = settings.n_threads
    if settings.n_threads_batch or settings.n_threads:
        params.cpuparams_batch.n_threads = settings.n_threads_batch or settings.n_threads
    if settings.embedding:
        params.embedding = True
        params.n_batch = params.n_ubatch = min(settings.n_ctx, 2048)
    if settings.chat_template:
        params.chat_template = settings.chat_template
    params.fit_params = False
    params.endpoint_metrics = True
    params.cors_origins = ""
    params.verbosity = _LOG_INFO if settings.verbose else _LOG_ERRORS
    return params


def command() -> list[str]:
    """How the process is started."""
    return [sys.executable, "-m", "gearcpp.server.worker"]


def first_line(settings: ModelSettings, socket: str, n_requests: int) -> str:
    """What its stdin begins with."""
    return json.dumps({"model": asdict(settings), "socket": socket, "requests": n_requests}) + "\n"


if __name__ == "__main__":
    main()
