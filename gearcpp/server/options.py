"""llama-server's settings by its names, put into an ``xllamacpp.CommonParams``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

from gearcpp.config import suggest
from gearcpp.errors import ConfigError

# Names of llama-server's command line that are not those of CommonParams' fields.
_FIELDS = {
    "b": "n_batch",
    "batch_size": "n_batch",
    "ub": "n_ubatch",
    "ubatch_size": "n_ubatch",
    "n": "n_predict",
    "predict": "n_predict",
    "keep": "n_keep",
    "cram": "cache_ram_mib",
    "cache_ram": "cache_ram_mib",
    "cache_reuse": "n_cache_reuse",
    "ctx_checkpoints": "n_ctx_checkpoints",
    "context_shift": "ctx_shift",
    "jinja": "use_jinja",
    "kvu": "kv_unified",
    "mmproj": "mmproj.path",
    "pooling": "pooling_type",
    "rope_scaling": "rope_scaling_type",
    "sps": "slot_prompt_similarity",
    "model_draft": "speculative.draft.mparams.path",
    "md": "speculative.draft.mparams.path",
    "draft_max": "speculative.draft.n_max",
    "draft_min": "speculative.draft.n_min",
    "spec_type": "speculative.types",
    "temp": "sampling.temp",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "seed": "sampling.seed",
    "repeat_penalty": "sampling.penalty_repeat",
    "repeat_last_n": "sampling.penalty_last_n",
    "presence_penalty": "sampling.penalty_present",
    "frequency_penalty": "sampling.penalty_freq",
    "reasoning_budget": "sampling.reasoning_budget_tokens",
    "chat_template_kwargs": "default_template_kwargs",
    "webui": "ui",
}
# Settings that are not given here, and how they are.
_OURS = {
    "an option of gearcpp's": "model m alias a host hostnames port api_key api_keys n_parallel parallel np ctx_size c n_ctx threads t embedding "
    "embeddings chat_template cors_origins hf_repo",
    "ssl_keyfile and ssl_certfile in a configuration file": "ssl_file_key ssl_file_cert",
    "--kv": "cache_type_k cache_type_v ctk ctv",
    "GEAR's device": "n_gpu_layers ngl gpu_layers flash_attn fa flash_attn_type no_kv_offload device dev",
    "nobody, since it would run programs for clients": "server_tools tools mcp_servers_config mcp_servers_json ui_mcp_proxy",
}
_SET_BY = {name: by for by, names in _OURS.items() for name in names.split()}


def from_command_line(words: Sequence[str]) -> dict[str, Any]:
    """``--name value``, ``--name=value`` and ``--flag`` as a mapping.

    Raises:
        ConfigError: a word is no option and no value of one.
    """
    options: dict[str, Any] = {}
    last = None
    for word in words:
        if word.startswith("-") and not word.lstrip("-")[:1].isdigit() and word.strip("-"):
            last, equals, value = word.lstrip("-").partition("=")
            options[last] = value if equals else True
            last = None if equals else last
        elif last:
            options[last], last = word, None
        else:
            raise ConfigError(f"{word!r} is not an option of llama-server's; options are given as --name value")
    return options


def put(params: Any, options: dict[str, Any]) -> None:
    """Set fields of CommonParams.

    Raises:
        ConfigError: a name is not known or not to be given here, or a value is not of its kind.
    """
    for given, value in options.items():
        name = given.replace("-", "_")
        if name in _SET_BY:
            raise ConfigError(f"{given} does not go among llama-server's options: it is set by {_SET_BY[name]}")
        negated = name.startswith("no_") and name not in _FIELDS and not hasattr(params, name)
        name = name.removeprefix("no_") if negated else name
        for path in (_FIELDS.get(name, name), f"n_{name}", f"sampling.{name}", f"speculative.draft.{name}"):
            *owners, attribute = path.split(".")
            owner = params
            for step in owners:
                owner = getattr(owner, step)
            if hasattr(owner, attribute):
                break
        else:
            raise ConfigError(f"{given} is not an option of llama-server's that xllamacpp has{suggest(name, list(_names(params)))}")
        try:
            setattr(owner, attribute, _converted(not value if negated else value, getattr(owner, attribute)))
        except (TypeError, ValueError, OverflowError, KeyError) as error:
            raise ConfigError(f"{given} cannot be {value!r}: {error}") from error


def _names(params: Any) -> Iterator[str]:
    yield from _FIELDS
    yield from (name for name in dir(params) if not name.startswith("_"))


def _converted(value: Any, present: Any) -> Any:
    """A value of the kind that the field has now."""
    if isinstance(present, bool):
        if str(value).lower() not in ("true", "false", "1", "0", "on", "off"):
            raise ValueError("it is on or off")
        return str(value).lower() in ("true", "1", "on")
    if isinstance(value, bool):
        raise ValueError("it needs a value")
    if isinstance(present, Enum):
        members = {name.lower().rpartition("type_")[2].rpartition("format_")[2]: member for name, member in type(present).__members__.items()}
        if str(value).lower() not in members:
            raise ValueError(f"it is one of {', '.join(members)}")
        return members[str(value).lower()]
    if isinstance(present, int):
        return int(value)
    if isinstance(present, float):
        return float(value)
    if isinstance(present, str):
        return str(value)
    raise ValueError("fields of this kind cannot be set here")
