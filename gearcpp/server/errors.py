"""What goes wrong with a request, and how OpenAI's API says it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from gearcpp.errors import ClosedError, ConfigError, GearError, OutOfMemoryError

logger = logging.getLogger("gearcpp.server")


class ContextLengthError(ConfigError):
    """A prompt that does not fit into the context."""


class CancelledError(GearError):
    """The client is gone, or the server stops: nobody waits for this answer."""


def describe(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON body for an exception. What the client can do nothing about is logged here, with its traceback."""
    while isinstance(getattr(error, "exceptions", None), tuple):  # an exception group, of which Python 3.10 has no class
        error = error.exceptions[0]  # type: ignore[attr-defined]
    if isinstance(error, HTTPException):
        return error.status_code, body(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        return 400, body(400, _problems(error.errors()))
    if isinstance(error, ContextLengthError):
        return 400, body(400, str(error), code="context_length_exceeded")
    if isinstance(error, (CancelledError, ClosedError, OutOfMemoryError)):
        return 503, body(503, str(error))
    if isinstance(error, (ConfigError, TemplateError)) or (isinstance(error, ValueError) and not isinstance(error, GearError)):
        return 400, body(400, str(error) or type(error).__name__)
    logger.error("a request failed", exc_info=error)
    return 500, body(500, str(error) if isinstance(error, GearError) else f"unexpected {type(error).__name__}; the server's log has the rest")


def body(status: int, message: str, *, code: str | None = None) -> dict[str, Any]:
    """The JSON object that OpenAI's API answers with when it does not do what was asked."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _problems(found: Sequence[dict[str, Any]]) -> str:
    """What is wrong, a few fields at most. Where one of several kinds would do, pydantic names every kind: of those only the field is said."""
    by_field: dict[str, list[dict[str, Any]]] = {}
    for problem in found:
        field = next((str(part) for part in problem.get("loc", ()) if part != "body"), "")
        by_field.setdefault(field, []).append(problem)
    return "; ".join(
        _where(problems[0]) if len(problems) == 1 else f"{field}: it has not the form that this field takes in OpenAI's API ({problems[0]['msg']})"
        for field, problems in list(by_field.items())[:5]
    )


def _where(problem: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in problem.get("loc", ()) if part != "body")
    if problem.get("type") == "json_invalid":
        return f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}"
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])
