"""KoboldAI's HTTP API, as far as this host has it, and the list of soft prompts with verdicts."""

import logging
import selectors
import socket
from typing import Any, Dict, List, Tuple

from flask import Blueprint, Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from ..errors import ContextExceeded, NoModel, SoftPromptError
from ..session import Session
from .fields import InvalidRequest, read_generation, read_object, read_soft_prompt
from .generation_queue import Generation, GenerationQueue, QueueClosed, QueueFull, describe

log = logging.getLogger(__name__)

API_VERSION = "1.2.5"
"""The release of KoboldAI's API that clients are told; from 1.2.2 on they send stop sequences."""

_GONE_SECONDS = 0.1
"""How often a request that waits for its text looks whether its client is still there."""


def add_api(app: Flask, session: Session, queue: GenerationQueue) -> None:
    """Add the API under ``/api/v1``, ``/api/latest`` and ``/api/extra``; every error below ``/api/`` is JSON."""
    for version in ("v1", "latest"):
        app.register_blueprint(_kobold_api(session, queue), url_prefix=f"/api/{version}", name=f"api_{version}")

    @app.get("/api/extra/softprompts")
    def softprompts() -> Dict[str, Any]:
        session.refresh()
        return session.status()

    @app.errorhandler(InvalidRequest)
    def invalid(error: InvalidRequest) -> Tuple[Response, int]:
        return jsonify(detail=error.detail), 422

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> Any:
        if not request.path.startswith("/api/"):
            return error
        response = _error(error.code or 500, error.description or error.name, error.name.lower().replace(" ", "_"))
        for name, value in error.get_headers():
            if name.lower() == "allow":
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def failed(error: Exception) -> Response:
        log.exception("%s %s failed", request.method, request.path)
        return _error(500, describe(error), "server_error")


def _kobold_api(session: Session, queue: GenerationQueue) -> Blueprint:
    api = Blueprint("api", __name__)

    @api.get("/info/version")
    def version() -> Dict[str, str]:
        return {"result": API_VERSION}

    @api.get("/model")
    def model() -> Dict[str, str]:
        engine = session.engine
        return {"result": engine.name if engine is not None else "ReadOnly"}

    @api.get("/config/max_context_length")
    def max_context_length() -> Dict[str, int]:
        engine = session.engine
        context = engine.context if engine is not None else None
        return {"value": context or 2048}

    @api.get("/config/soft_prompt")
    def get_soft_prompt() -> Dict[str, str]:
        return {"value": next(iter(session.selection), "")}

    @api.put("/config/soft_prompt")
    def put_soft_prompt() -> Any:
        filename = read_soft_prompt(read_object(request.get_data()))
        try:
            session.select(filename)
        except SoftPromptError as error:
            return jsonify(detail={"value": [str(error)]}), 422
        return {}

    @api.get("/config/soft_prompts_list")
    def soft_prompts_list() -> Dict[str, List[Dict[str, str]]]:
        return {"values": [{"value": entry.filename} for entry in session.entries() if entry.verdict.usable]}

    @api.post("/generate")
    def generate() -> Any:
        wanted = read_generation(read_object(request.get_data()))
        try:
            softprompts = wanted.softprompts(session)
        except SoftPromptError as error:
            return jsonify(detail={"soft_prompt": [str(error)]}), 422
        engine = session.engine
        if engine is None:
            return _error(503, "No model is loaded.", "service_unavailable")
        generations: List[Generation] = []
        try:
            for settings in wanted.settings:
                generations.append(queue.submit(engine, settings, softprompts))
            _wait(generations, request.environ.get("werkzeug.socket"))
        except (QueueClosed, QueueFull) as error:
            return _generation_error(error)
        finally:
            for generation in generations:
                queue.stop(generation)
        for generation in generations:
            if generation.error is not None:
                return _generation_error(generation.error)
        return {"results": [{"text": generation.text} for generation in generations]}

    return api


def _generation_error(error: BaseException) -> Response:
    if isinstance(error, ContextExceeded):
        return _error(422, str(error), "context_exceeded")
    if isinstance(error, (NoModel, QueueClosed, QueueFull)):
        return _error(503, str(error), "service_unavailable")
    return _error(500, describe(error), "server_error")


def _error(status: int, message: str, kind: str) -> Response:
    response = jsonify(detail={"msg": message, "type": kind})
    response.status_code = status
    return response


def _wait(generations: List[Generation], client: Any) -> None:
    """Wait for all of them, or until the client is gone; ``client``: its socket, where the server tells."""
    for generation in generations:
        while not generation.finished.wait(_GONE_SECONDS):
            if client is not None and _is_gone(client):
                return


def _is_gone(client: Any) -> bool:
    """Whether the other side has closed the connection: there is something to read, and it is the end."""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ)
            return bool(selector.select(0)) and client.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):  # closed on our side
        return True
