"""What goes wrong with a request, as OpenAI's API says it."""

from __future__ import annotations

import json
import re
from typing import Any

_LONGEST = 400  # characters of a message
# llama.cpp's server answers these with 500 or 501, though it is the request that has to change.
_OF_THE_REQUEST = re.compile("not support|too large|jinja|template|grammar|schema|prompt|token|parse|image|audio|must |expected|invalid", re.IGNORECASE)
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = body(status, message, code)
        self.headers = headers or {}


def body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The JSON object that OpenAI's API answers with when it does not do what was asked."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def translate(status: int, data: bytes, asked: str) -> RequestError:
    """An error of llama.cpp's server as one of OpenAI's API: one sentence, and a status that says whose fault it is.

    Args:
        status: HTTP's.
        data: the body.
        asked: method and path.
    """
    try:
        error = json.loads(data)["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError):
        error, message = {}, data.decode("utf-8", "replace") or f"llama.cpp's server answered with status {status}"
    message = " ".join(re.sub(r"\[json\.exception\.[\w.]+\] ", "", message).split())
    if len(message) > _LONGEST:
        message = message[: _LONGEST - 3] + "..."
    if message == "File Not Found":
        message = f"there is no {asked} here"
    code = "context_length_exceeded" if error.get("type") == "exceed_context_size_error" else None
    if status >= 500 and status != 503 and _OF_THE_REQUEST.search(message):
        status = 400
    return RequestError(status, message, code)
