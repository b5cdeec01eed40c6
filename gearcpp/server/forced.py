"""A tool that the client demands.

llama.cpp's server leaves it to the model whether ``tool_choice`` of "required", or of a function by name, is followed. Here it is: the server is asked for
JSON by a schema, that of the tool's arguments, while the template still tells the model of the tools, and the JSON is made the call.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from .errors import RequestError


def demanded(request: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The functions of which one must be called; none: the model may choose.

    Raises:
        RequestError: there is no such function, or the request asks for what does not go together with it.
    """
    choice = request.get("tool_choice")
    if kind != "/chat/completions" or choice in (None, "none", "auto"):
        return []
    tools = request.get("tools")
    functions = (
        [tool["function"] for tool in tools if isinstance(tool, dict) and isinstance(tool.get("function"), dict)] if isinstance(tools, list) else []
    )
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
        functions = [function for function in functions if function.get("name") == name]
        if not functions:
            raise RequestError(400, f"tool_choice asks for the tool {name!r}, which is not among the tools")
    elif choice != "required":
        raise RequestError(400, f"tool_choice must be 'none', 'auto', 'required' or a function, not {choice!r}")
    if not functions or not all(isinstance(function.get("name"), str) for function in functions):
        raise RequestError(400, "each of the tools must be a function with a name")
    for name in ("response_format", "grammar", "json_schema"):
        if request.get(name):
            raise RequestError(400, f"{name} does not go together with a tool that must be called")
    if request.get("n") not in (None, 1):
        raise RequestError(400, "n must be 1 where a tool must be called")
    return functions


def as_schema(request: dict[str, Any], functions: list[dict[str, Any]]) -> dict[str, Any]:
    """The request for JSON that is the call of one of these functions: of its arguments alone where there is one function."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": _parameters(function)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    schema = _parameters(functions[0]) if len(functions) == 1 else {"anyOf": calls}
    return {**request, "tool_choice": "none", "response_format": {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}}}


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    return parameters if isinstance(parameters, dict) and parameters else {"type": "object"}


def as_call(answer: bytes, functions: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole answer with the call in place of its JSON. One that was cut off at max_tokens keeps what there is of it, and says "length"."""
    whole: dict[str, Any] = json.loads(answer)
    choice = whole["choices"][0]
    text = choice["message"].get("content") or ""
    name, arguments = functions[0]["name"], text
    if len(functions) > 1:
        try:
            call = json.loads(text)
        except ValueError:
            return whole  # cut off before it is known which
        name, arguments = call["name"], json.dumps(call["arguments"])
    calls = [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": arguments}}]
    choice["message"] = {**choice["message"], "content": None, "tool_calls": calls}
    choice["finish_reason"] = "tool_calls" if choice["finish_reason"] == "stop" else choice["finish_reason"]
    return whole


def as_stream(whole: dict[str, Any], *, has_usage: bool) -> bytes:
    """The events of a stream that say the same at once."""
    head = {name: value for name, value in whole.items() if name not in ("choices", "usage", "timings")} | {"object": "chat.completion.chunk"}
    choice = whole["choices"][0]
    message = {name: value for name, value in choice["message"].items() if value is not None or name == "content"}
    if "tool_calls" in message:
        message["tool_calls"] = [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]
    events = [
        {**head, "choices": [{"index": 0, "delta": message, "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]},
        *([{**head, "choices": [], "usage": whole.get("usage")}] if has_usage else []),
    ]
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n"
