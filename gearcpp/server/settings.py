"""Settings of the server and of its models: those of llama-cpp-python's server, and ours.

They come from the command line, from a configuration file, or from environment variables that begin with ``GEARCPP_`` (llama-cpp-python's read names as
common as HOST and MODEL).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from llama_cpp.server.settings import ModelSettings, ServerSettings
from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from gearcpp.cache.kv_type import normalize_kv_type
from gearcpp.errors import ConfigError, DataError

_FROM_ENVIRONMENT = SettingsConfigDict(env_prefix="GEARCPP_", protected_namespaces=())

# Settings of llama-cpp-python's server that have no place here, and why. All others go to gearcpp.Llama, which says what contradicts its cache.
_REFUSED = {
    "rpc_servers": "llama-cpp-python ignores it; see docs/server.md for llama.cpp's RPC backend",
    "clip_model_path": "images are not supported",
    "cache": "prompts share what they have in common in the KV cache itself",
    "draft_model": "sequences are decoded together, without drafts",
    "hf_tokenizer_config_path": "the GGUF file's own tokenizer is used",
    "hf_pretrained_model_name_or_path": "the GGUF file's own tokenizer is used",
    "kv_overrides": "they are not supported",
    "logits_all": "the server looks at the logits of each token as it comes",
}
_NOT_OF_LLAMA = {
    *("model", "model_alias", "parallel", "pooling", "hf_model_repo_id", "chat_template_kwargs", "mul_mat_q"),
    *("cache_type", "cache_size", "draft_model_num_pred_tokens", *_REFUSED),
}


class GearModelSettings(ModelSettings):
    """One model. Fields that are not set are gearcpp.Llama's defaults, not those of llama-cpp-python's server."""

    model_config = _FROM_ENVIRONMENT

    kv_type: str | list[str] | dict[str, Any] = Field(default="gear", description="The KV cache, as in gearcpp.Llama.")
    parallel: int = Field(default=4, ge=1, description="Most sequences decoded together; they share the context's cells.")
    swa_full: bool = Field(default=False, description="Sliding windows get as many cells as the context, so that requests share prefixes there, too.")
    pooling: int | None = Field(default=None, description="How token embeddings become one: llama.cpp's number; the model's own, or the mean, if not set.")
    logits_all: bool = Field(default=False, description="Not supported, and not needed for log-probabilities.")
    verbose: bool = Field(default=False, description="llama.cpp's log on stderr.")

    def llama_arguments(self) -> dict[str, Any]:
        """The arguments that were set, for gearcpp.Llama.

        Raises:
            ConfigError: a setting is not supported, or kv_type is not understood.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        for name, reason in _REFUSED.items():
            if given.get(name):
                raise ConfigError(f"{name} does not go with this server: {reason}")
        if isinstance(given.get("kv_type"), list):
            given["kv_type"] = tuple(given["kv_type"])
        normalize_kv_type(given.get("kv_type", "gear"))
        return {"verbose": self.verbose, **{name: value for name, value in given.items() if name not in _NOT_OF_LLAMA}}


class GearServerSettings(ServerSettings):
    """The server."""

    model_config = _FROM_ENVIRONMENT

    host: str = Field(default="127.0.0.1", description="Listen address.")
    port: int = Field(default=8080, ge=0, le=65535, description="Listen port; 0: any free one.")
    interrupt_requests: bool = Field(default=False, description="Not supported: it would end one client's stream for another.")
    max_queue: int = Field(default=64, ge=0, description="Requests that wait for their turn; any more are answered with 429.")
    max_body_bytes: int = Field(default=8 * 2**20, ge=1, description="Of a request; larger ones are answered with 413.")
    cors_origins: list[str] = Field(default=[], description="Web pages from these origins may use the server; none, if not set.")

    def check(self) -> None:
        """Raise ConfigError where settings are not supported or contradict each other."""
        if self.interrupt_requests:
            raise ConfigError("interrupt_requests does not go with this server: it would cut off the answer of one client whenever another one asks")
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise ConfigError("ssl_keyfile and ssl_certfile go together")


class _ConfigFile(GearServerSettings):
    models: list[GearModelSettings] = Field(min_length=1)


def read_config(path: Path) -> tuple[GearServerSettings, list[GearModelSettings]]:
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
    config = checked(_ConfigFile, values)
    server = GearServerSettings.model_construct(_fields_set=config.model_fields_set, **{n: getattr(config, n) for n in GearServerSettings.model_fields})
    return server, config.models


def checked(kind: Any, values: dict[str, Any]) -> Any:
    """Settings of a kind. ConfigError, in one line, where pydantic finds fault."""
    try:
        return kind(**values)
    except ValidationError as error:
        faults = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError("; ".join(faults)) from error
