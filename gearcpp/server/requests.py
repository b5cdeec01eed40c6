"""What clients send, made into what llama-cpp-python's routes understand.

The routes leave out fields that they do not know and answer as if these had not been there. What would change the answer is translated here or refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest, CreateEmbeddingRequest

from gearcpp.config import suggest
from gearcpp.errors import ConfigError
from gearcpp.runtime.asked import chosen_tools, plain_messages, plain_response_format

COMPLETIONS = ("/v1/completions", "/v1/engines/copilot-codex/completions")
CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
GENERATING = (*COMPLETIONS, CHAT, EMBEDDINGS)  # paths whose requests take their turn; all others answer at once


@dataclass(frozen=True)
class Prepared:
    """A request as the routes should get it.

    Attributes:
        body: JSON.
        wants_usage: whether a stream's last event should say how many tokens it took (``stream_options.include_usage``), which the routes do not know.
    """

    body: bytes
    wants_usage: bool


def prepare(path: str, data: bytes) -> Prepared:
    """A request to one of the `GENERATING` paths.

    Raises:
        ConfigError: it is not a JSON object, or asks for what is not supported.
    """
    try:
        request = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise ConfigError("the body must be a JSON object")
    _check_fields(path, request)
    if path == EMBEDDINGS:
        _prepare_embedding(request)
    else:
        for name in ("n", "best_of"):
            if request.get(name) not in (None, 1):
                raise ConfigError(f"{name} must be 1: send several requests for several answers")
        if path == CHAT:
            _prepare_chat(request)
        else:
            _prepare_completion(request)
    options = request.get("stream_options")
    return Prepared(json.dumps(request).encode(), bool(isinstance(options, dict) and options.get("include_usage")))


# Fields of OpenAI's API, and of clients of llama.cpp, that change nothing about an answer.
_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "stream_options", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "cache_prompt"),
    *("n", "best_of", "max_completion_tokens", "dimensions", "parallel_tool_calls", "return_progress", "timings_per_token", "encoding_format"),
}


def _check_fields(path: str, request: dict[str, Any]) -> None:
    """Refuse a field that would be dropped though the client wants something by it. null asks for nothing."""
    kind = CreateEmbeddingRequest if path == EMBEDDINGS else CreateChatCompletionRequest if path == CHAT else CreateCompletionRequest
    for name, value in request.items():
        if value is None or name in kind.model_fields or name in _WITHOUT_EFFECT or (name, value) in (("modalities", ["text"]), ("typical_p", 1)):
            continue
        raise ConfigError(f"{name} is not supported{suggest(name, list(kind.model_fields))}; leave it out")
    if request.get("encoding_format") not in (None, "float", "base64"):  # openai's client asks for base64 by itself, and takes numbers
        raise ConfigError("encoding_format must be float")


def _prepare_completion(request: dict[str, Any]) -> None:
    prompt = request.get("prompt", "")
    if isinstance(prompt, list) and (len(prompt) != 1 or not isinstance(prompt[0], str)):
        raise ConfigError("prompt must be a string, or a list of one string: send several requests for several prompts")


def _prepare_chat(request: dict[str, Any]) -> None:
    request["messages"] = plain_messages(request.get("messages"))
    tools, choice = chosen_tools(request.get("tools"), request.get("tool_choice"))
    request.update({name: value for name, value in (("tools", tools), ("tool_choice", choice)) if name in request})
    if "response_format" in request:
        request["response_format"] = plain_response_format(request["response_format"])
    if request.get("max_tokens") is None and request.get("max_completion_tokens") is not None:
        request["max_tokens"] = request["max_completion_tokens"]
    if request.get("logprobs") and request.get("top_logprobs") is None:
        request["top_logprobs"] = 0


def _prepare_embedding(request: dict[str, Any]) -> None:
    if request.get("dimensions") is not None:
        raise ConfigError("dimensions is not supported: the model's own number of dimensions is what there is")
