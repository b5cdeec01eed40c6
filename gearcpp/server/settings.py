"""Settings of the server and of its models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from gearcpp.cache.kv_type import normalize_kv_type
from gearcpp.config import suggest
from gearcpp.errors import ConfigError, DataError

Settings = TypeVar("Settings", "ModelSettings", "ServerSettings")


@dataclass(frozen=True)
class ModelSettings:
    """One model.

    Attributes:
        model: GGUF file.
        model_alias: its name for clients; default: the file's.
        kv_type: the KV cache, as in `gearcpp.Llama`: a preset, a mapping of `GearConfig`'s fields, one of llama.cpp's own types or a pair of them.
        n_ctx: tokens of the context; 0: all that the model was trained for. Every slot of a GEAR cache has so many; f16 and the like are shared.
        parallel: slots, which is how many requests are decoded together.
        kv_budget: bytes that the caches of all slots may take; the context of each is cut to what fits.
        n_threads, n_threads_batch: of generation and of prompts; None: the cores.
        embedding: it embeds, and does nothing else.
        chat_template: of llama.cpp's by name, or Jinja text; default: the model's own.
        verbose: llama.cpp's log on stderr.
        options: everything else, by llama-server's names without the dashes.
    """

    model: str
    model_alias: str | None = None
    kv_type: str | list[str] | dict[str, Any] = "gear"
    n_ctx: int = 8192
    parallel: int = 4
    kv_budget: int | None = None
    n_threads: int | None = None
    n_threads_batch: int | None = None
    embedding: bool = False
    chat_template: str | None = None
    verbose: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_types(self)
        for name, least in (("n_ctx", 0), ("parallel", 1), ("kv_budget", 1), ("n_threads", 1), ("n_threads_batch", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, not {value}")
        if self.parallel > 256:
            raise ConfigError(f"parallel must be 1 to 256, which is what llama.cpp has sequences for, not {self.parallel}")
        kv = normalize_kv_type(self.cache)
        if kv.method:
            raise ConfigError(f"kv_type {kv.name!r} is computed in Python, which the server has no room for; take a preset of gearcpp's")

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.model_alias or Path(self.model).stem

    @property
    def cache(self) -> Any:
        """``kv_type`` as `normalize_kv_type` takes it."""
        return tuple(self.kv_type) if isinstance(self.kv_type, list) else self.kv_type


@dataclass(frozen=True)
class ServerSettings:
    """The server.

    Attributes:
        host, port: where it listens; port 0: any free one.
        api_key: what clients must send; None: nothing.
        max_queue: requests that wait for their turn; any more are answered with 429.
        max_body_bytes: of a request; larger ones are answered with 413.
        cors_origins: web pages from these origins may use the server.
        ssl_keyfile, ssl_certfile: for TLS.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    max_queue: int = 64
    max_body_bytes: int = 8 * 2**20
    cors_origins: list[str] = field(default_factory=list)
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 to 65535, not {self.port}")
        if self.max_queue < 0 or self.max_body_bytes < 1:
            raise ConfigError("max_queue must be at least 0, max_body_bytes at least 1")
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise ConfigError("ssl_keyfile and ssl_certfile go together")


def read_config(path: Path) -> tuple[ServerSettings, list[ModelSettings]]:
    """Settings from a JSON or YAML file: those of the server, and under ``models`` a list of models.

    Raises:
        DataError: the file cannot be read, or is neither JSON nor YAML.
        ConfigError: a setting is unknown or out of range.
    """
    try:
        content = path.read_text(encoding="utf-8")
        values = yaml.safe_load(content) if path.suffix in (".yaml", ".yml") else json.loads(content)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not a configuration: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold an object with settings and a list of models")
    models = values.pop("models", None)
    if not isinstance(models, list) or not models:
        raise ConfigError("models must be a list of at least one model")
    return _settings(ServerSettings, values, ""), [_settings(ModelSettings, model, f"models.{i}") for i, model in enumerate(models)]


def _settings(kind: type[Settings], values: Any, place: str) -> Settings:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} must be an object")
    known = [f.name for f in fields(kind)]
    for name in values:
        if name not in known:
            more = "; llama-server's own settings go under options" if kind is ModelSettings else ""
            raise ConfigError(f"{place and place + '.'}{name} is not a setting{suggest(str(name), known)}{more}")
    if kind is ModelSettings and "model" not in values:
        raise ConfigError(f"{place}.model is missing: the GGUF file")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{place and place + '.'}{error}") from error


_WORDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object", type(None): "null"}


def _check_types(settings: Any) -> None:
    """Raise ConfigError for a value of another type than its field has: a file can say anything."""
    for name, hint in get_type_hints(type(settings)).items():
        choices = (hint,) if hasattr(hint, "__origin__") or isinstance(hint, type) else hint.__args__
        kinds = [getattr(kind, "__origin__", kind) for kind in choices]
        value = getattr(settings, name)
        if type(value) not in kinds or (name == "cors_origins" and not all(isinstance(item, str) for item in value)):
            raise ConfigError(f"{name} must be {' or '.join(_WORDS[kind] for kind in kinds)}, not {value!r}")
