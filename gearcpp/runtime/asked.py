"""What is asked for is done or refused: arguments and fields that llama-cpp-python takes and drops, or takes for something else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import suggest
from ..errors import ConfigError

_ROLES = ("system", "user", "assistant", "tool", "function")
_RANGES = {  # sampling parameter: least and most
    "temperature": (0.0, math.inf),
    "temp": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repeat_penalty": (0.0, math.inf),
    "frequency_penalty": (-math.inf, math.inf),
    "presence_penalty": (-math.inf, math.inf),
    "mirostat_tau": (0.0, math.inf),
    "mirostat_eta": (0.0, math.inf),
}


def check_sampling(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first sampling parameter that nothing could follow; None means not given."""
    for name, (low, high) in _RANGES.items():
        value = given.get(name)
        if value is None:
            continue
        if name == "repeat_penalty" and value == 0:
            raise ConfigError("repeat_penalty 0 would make tokens that were there before certain; 1 is off")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not low <= value <= high:
            bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}" if math.isfinite(low) else "that is finite"
            raise ConfigError(f"{name} must be a number {bounds}, not {value!r}")
    if given.get("mirostat_mode") not in (None, 0, 1, 2):
        raise ConfigError(f"mirostat_mode must be 0 (off), 1 or 2, not {given['mirostat_mode']!r}")
    if given.get("penalize_nl") is False:
        raise ConfigError("penalize_nl=False: llama.cpp penalizes newlines as other tokens; leave it out")
    if given.get("tfs_z") not in (None, 1):
        raise ConfigError("tfs_z: llama.cpp has no tail-free sampling any more; leave it out, or use min_p")


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as every chat template takes them: content as one text, and only roles that templates know.

    Raises:
        ConfigError: a message is none, or holds what is no text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ConfigError("messages must hold at least one message")
    return [_plain_message(i, message) for i, message in enumerate(messages)]


def _plain_message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(f"messages.{i} must be an object with role and content, not {type(message).__name__}")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in _ROLES:
        raise ConfigError(f"messages.{i}.role must be one of developer, {', '.join(_ROLES)}, not {role!r}")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_text_of_part(f"messages.{i}.content.{j}", part) for j, part in enumerate(content))
    if content is None and role != "assistant":
        raise ConfigError(f"messages.{i}.content is missing")
    if content is not None and not isinstance(content, str):
        raise ConfigError(f"messages.{i}.content must be a text or a list of parts, not {type(content).__name__}")
    return {**message, "role": role, "content": content} if content is not None or "content" in message else {**message, "role": role}


def _text_of_part(place: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(kind) if isinstance(part, Mapping) and kind in ("text", "refusal") else None
    if kind in ("text", "refusal") and isinstance(text, str):
        return text
    if kind in ("text", "refusal"):
        raise ConfigError(f"{place}.{kind} must be a text")
    raise ConfigError(f"{place}: parts of type {kind!r} are not supported, only text (images, audio and files are not)")


def chosen_tools(tools: Any, choice: Any) -> tuple[Any, Any]:
    """Tools and tool_choice as llama-cpp-python's chat handlers follow them: a tool that must be called is named, tools that must not are left out.

    Raises:
        ConfigError: the choice cannot be followed.
    """
    if choice is None or choice == "auto":
        return tools, choice
    if choice == "none":
        return None, None
    if not tools:
        raise ConfigError("tool_choice asks for a call, but there are no tools")
    names = [(tool.get("function") or {}).get("name") for tool in tools if isinstance(tool, Mapping)]
    if choice == "required":
        if len(names) != 1:
            raise ConfigError("tool_choice='required' can be followed with one tool only: name it, as in {'type': 'function', 'function': {'name': ...}}")
        choice = {"type": "function", "function": {"name": names[0]}}
    name = (choice.get("function") or {}).get("name") if isinstance(choice, Mapping) else None
    if name is None:
        raise ConfigError(f"tool_choice must be 'none', 'auto', 'required', or name a function, not {choice!r}")
    if name not in names:
        raise ConfigError(f"tool_choice names {name!r}, which is not among the tools ({', '.join(map(str, names))})")
    return tools, choice


def plain_response_format(form: Any) -> Any:
    """A response_format as llama-cpp-python follows it.

    Raises:
        ConfigError: it is of another kind, or its schema is none.
    """
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "json_schema":
        schema = (form.get("json_schema") or {}).get("schema")
        if not isinstance(schema, dict):
            raise ConfigError("response_format.json_schema.schema must be a JSON schema")
        return {"type": "json_object", "schema": schema}
    if kind not in ("text", "json_object"):
        raise ConfigError(f"response_format.type must be text, json_object or json_schema, not {kind!r}")
    return form


def chosen_logprobs(logprobs: Any, top_logprobs: Any) -> int | None:
    """top_logprobs as llama-cpp-python's chat handlers follow it: they give no log-probabilities at all where only ``logprobs`` is set.

    Raises:
        ConfigError: top_logprobs without logprobs, or out of range.
    """
    if top_logprobs is not None and (isinstance(top_logprobs, bool) or not isinstance(top_logprobs, int) or top_logprobs < 0):
        raise ConfigError(f"top_logprobs must be a whole number of at least 0, not {top_logprobs!r}")
    if top_logprobs and not logprobs:
        raise ConfigError("top_logprobs does nothing without logprobs=True")
    return (top_logprobs or 0) if logprobs else None


def check_schemas(given: Mapping[str, Any], verbose: bool) -> None:
    """Refuse a schema that no grammar can be made of (llama-cpp-python would take any JSON for it), and two grammars for one answer.

    Args:
        given: of `create_chat_completion`, with tools, tool_choice and response_format as the functions above leave them.
        verbose: whether the grammar is printed.

    Raises:
        ConfigError: as said.
    """
    from llama_cpp import LlamaGrammar

    schemas = {}
    form, choice = given.get("response_format") or {}, given.get("tool_choice")
    if form.get("type") == "json_object":
        schemas["response_format"] = form.get("schema")
    if isinstance(choice, Mapping):
        name = choice["function"]["name"]
        schemas[f"the tool {name!r}"] = next(t["function"].get("parameters") for t in given["tools"] if t["function"]["name"] == name)
    if len(schemas) + (given.get("grammar") is not None) > 1:
        raise ConfigError(f"an answer follows one grammar, but there are several: {', '.join((*schemas, *(['grammar'] if given.get('grammar') else [])))}")
    for what, schema in schemas.items():
        if schema is None:
            continue
        try:
            LlamaGrammar.from_json_schema(json.dumps(schema), verbose=verbose)
        except Exception as error:  # of many kinds, from KeyError to JSONDecodeError
            raise ConfigError(f"no grammar can be made of the schema of {what}: {type(error).__name__}: {error}") from error


def check_grammar(model: Any, grammar: Any) -> None:
    """Raise ConfigError for a grammar that llama.cpp cannot read: llama_cpp.Llama would crash on it.

    Args:
        model: llama.cpp's, of the vocabulary that the grammar is for.
        grammar: a llama_cpp.LlamaGrammar, or None.
    """
    import llama_cpp

    if grammar is None:
        return
    if not isinstance(grammar, llama_cpp.LlamaGrammar):
        raise ConfigError(f"grammar must be a llama_cpp.LlamaGrammar, as LlamaGrammar.from_string(text) makes one, not {type(grammar).__name__}")
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    sampler = llama_cpp.llama_sampler_init_grammar(vocabulary, grammar._grammar.encode("utf-8"), grammar._root.encode("utf-8"))
    if not sampler:
        raise ConfigError("llama.cpp cannot read the grammar; what is wrong with it stands on stderr")
    llama_cpp.llama_sampler_free(sampler)


def check_chat_format(name: str | None, llm: Any) -> None:
    """Raise ConfigError for a chat format that llama-cpp-python does not know; it would say so with the first chat.

    Args:
        name: the format, or None.
        llm: a llama_cpp.Llama, whose model may bring formats of its own; with a ``chat_handler`` the name is not used.
    """
    from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerRegistry

    known = [*llm._chat_handlers, *LlamaChatCompletionHandlerRegistry()._chat_handlers]
    if name and not llm.chat_handler and name not in known:
        raise ConfigError(f"unknown chat_format {name!r}{suggest(name, known) or '; known: ' + ', '.join(sorted(known))}")
