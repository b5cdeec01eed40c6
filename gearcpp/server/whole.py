"""A whole answer out of a stream.

llama.cpp's server looks whether the client of a whole answer is still there only when a second passes without a result of anybody's, which with several
clients is never; that of a stream it misses at the next token. So the gate asks for a stream and puts its pieces together.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from .errors import RequestError

PATHS = ("/completions", "/chat/completions")  # without /v1


def can_be_streamed(request: dict[str, Any], kind: str) -> bool:
    """Whether the pieces of its stream make the whole: one answer to one prompt."""
    one = request.get("n") in (None, 1) and (kind == "/chat/completions" or isinstance(request.get("prompt"), str))
    return kind in PATHS and one and not request.get("stream") and not request.get("stream_options")


async def joined(chunks: AsyncIterator[bytes]) -> bytes:
    """The JSON of the whole answer.

    Raises:
        RequestError: the stream ended with an error, or without its end.
    """
    data = b"".join([chunk async for chunk in chunks])
    events = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
    failed = next((event["error"] for event in events if "error" in event), None)
    if failed or not any(event.get("choices") and event["choices"][0]["finish_reason"] for event in events):
        raise RequestError(500, str(failed["message"]) if failed else "llama.cpp's server ended the answer without a reason")
    whole: dict[str, Any] = {}
    answer: dict[str, Any] = {}
    logprobs: list[Any] = []
    for event in events:
        for choice in event.pop("choices"):
            _append(answer, choice["delta"] if "delta" in choice else {"text": choice["text"]})
            logprobs += (choice.get("logprobs") or {}).get("content") or []
            if choice["finish_reason"]:
                whole["finish_reason"] = choice["finish_reason"]
        whole.update(event)
    choice = {"index": 0, "finish_reason": whole.pop("finish_reason"), "logprobs": {"content": logprobs} if logprobs else None}
    if whole["object"] == "chat.completion.chunk":
        whole["object"] = "chat.completion"
        answer = {"message": {"role": "assistant", "content": None, **answer}}
    return json.dumps({**whole, "choices": [{**choice, **answer}]}).encode()


def _append(answer: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add a piece: texts grow, tool calls by their number."""
    for name, value in delta.items():
        if name == "tool_calls":
            calls = answer.setdefault(name, [])
            for call in value:
                while len(calls) <= call["index"]:
                    calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
                own = calls[call["index"]]
                own["id"] = call.get("id") or own["id"]
                for part, text in call.get("function", {}).items():
                    own["function"][part] += text or ""
        elif isinstance(value, str) and name != "role":
            answer[name] = (answer.get(name) or "") + value
        elif value is not None or name not in answer:
            answer[name] = value
