"""Errors as answers: in KoboldAI's form, and below ``/v1/`` in OpenAI's."""

import logging
from typing import Any, Dict, Optional, Tuple

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from ..errors import ContextExceeded, EngineUnreachable, NoModel, SoftPromptError, UnsupportedCall
from .fields import InvalidRequest
from .generation_queue import QueueClosed, QueueFull, describe

log = logging.getLogger(__name__)

NO_MODEL = "API generation is not supported in read-only mode; please load a model and then try again."
"""KoboldAI's sentence; clients know "ReadOnly" as the name of no model."""

_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def add_refusals(app: Flask) -> None:
    """Have every error of a request below ``/api/`` and ``/v1/`` answered as JSON."""

    @app.errorhandler(InvalidRequest)
    def invalid(error: InvalidRequest) -> Response:
        return invalid_fields(error.detail)

    @app.errorhandler(SoftPromptError)
    def ours(error: SoftPromptError) -> Response:
        return refusal(error)

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Any:
        if not request.path.startswith(("/api/", "/v1/")):
            return error
        kind = error.name.lower().replace(" ", "_")
        response = _answer(error.code or 500, {"msg": error.description or error.name, "type": kind})
        for name, value in error.get_headers():
            if name.lower() == "allow":
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def failed(error: Exception) -> Response:
        log.exception("%s %s failed", request.method, request.path)
        return refusal(error)


def refusal(error: BaseException) -> Response:
    """The answer to a request that ended with ``error``."""
    status, detail = status_of(error)
    return _answer(status, detail)


def invalid_fields(detail: Dict[str, Any]) -> Response:
    """The answer to fields that are wrong; ``detail``: the messages of each."""
    if not _is_openai():
        return _json(422, {"detail": detail})
    field, messages = next(iter(detail.items()))
    return _answer(400, {"msg": f"{field}: {' '.join(messages)}", "type": "invalid_request_error"}, field)


def status_of(error: BaseException) -> Tuple[int, Dict[str, str]]:
    """The status and KoboldAI's ``detail`` of an error."""
    text = str(error)
    if isinstance(error, ContextExceeded):
        return 422, {"msg": text, "type": "context_exceeded"}
    if isinstance(error, UnsupportedCall):  # what was asked for is right, but not for this engine
        return 422, {"msg": text, "type": "not_supported"}
    if isinstance(error, NoModel):
        return 501, {"msg": text, "type": "not_implemented"}
    if isinstance(error, (EngineUnreachable, QueueClosed, QueueFull)):
        return 503, {"msg": text, "type": "service_unavailable"}
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _MEMORY_WORDS):
        message = f"The model ran out of memory: {text}" if text else "The model ran out of memory."
        return 507, {"msg": message, "type": f"out_of_memory.{_kind_of_memory(text)}"}
    return 500, {"msg": describe(error), "type": "server_error"}


def openai_error(detail: Dict[str, str], field: Optional[str] = None) -> Dict[str, Any]:
    """KoboldAI's ``detail`` in OpenAI's form."""
    return {"error": {"message": detail["msg"], "type": detail["type"], "param": field, "code": None}}


def _answer(status: int, detail: Dict[str, str], field: Optional[str] = None) -> Response:
    return _json(status, openai_error(detail, field) if _is_openai() else {"detail": detail})


def _json(status: int, value: Dict[str, Any]) -> Response:
    response = jsonify(value)
    response.status_code = status
    return response


def _is_openai() -> bool:
    return request.path.startswith("/v1/")


def _kind_of_memory(text: str) -> str:
    """KoboldAI's words for whose memory it was."""
    if "CUDA" in text:
        return "gpu.cuda"
    if "HIP" in text:
        return "gpu.hip"
    return "cpu.default_cpu_allocator" if "DefaultCPUAllocator" in text else "unknown.unknown"
