"""KoboldAI's HTTP API, and what KoboldCpp added to it; every error is JSON."""

import time
from contextlib import suppress
from typing import Any, Dict, Iterator, List, Optional

from flask import Blueprint, Flask, Response, request

from ..engines import Engine, Tokenizing
from ..errors import NoModel, SoftPromptError
from ..session import Session
from ..soft_tokens.text import without_soft_tokens
from ..softprompt import read_tags
from .characters import Characters
from .fields import (
    CHARACTER,
    KEY,
    SELECTION,
    SOFT_PROMPT,
    TOKENS,
    Field,
    read,
    read_generation,
    read_object,
)
from .generation_queue import Generation, GenerationQueue
from .openai import add_openai
from .openapi import document
from .refusals import NO_MODEL, add_refusals, invalid_fields, refusal, status_of
from .replies import Texts, as_json, client_name, stream

API_VERSION = "1.2.5"
"""The release of KoboldAI's API that clients are told; from 1.2.2 on they send stop sequences."""

KOBOLDCPP_VERSION = "1.76"
"""The release of KoboldCpp whose additions these are; without it, KoboldAI Lite asks for eight tokens at a time."""

_CONTEXT = 2048
"""What a client is told where nothing tells the model's context."""


def add_api(app: Flask, session: Session, queue: GenerationQueue, characters: Characters, protected: bool) -> None:
    """Add ``/api/v1``, ``/api/latest``, ``/api/extra`` and ``/v1``; ``protected``: a key is asked for elsewhere."""
    for version in ("v1", "latest"):
        app.register_blueprint(
            _kobold_api(session, queue, characters), url_prefix=f"/api/{version}", name=f"api_{version}"
        )
    app.register_blueprint(_extra_api(session, queue, characters, protected), url_prefix="/api/extra", name="extra")
    app.register_blueprint(_softprompts_api(session, characters), url_prefix="/api/extra/softprompts")
    add_openai(app, session, queue, characters)
    add_refusals(app)


def _kobold_api(session: Session, queue: GenerationQueue, characters: Characters) -> Blueprint:
    api = Blueprint("api", __name__)

    @api.get("/openapi.json")
    def openapi() -> Dict[str, Any]:
        usable = [entry.filename for entry in session.entries() if entry.verdict.usable]
        return document(API_VERSION, usable)

    @api.get("/info/version")
    def version() -> Dict[str, str]:
        return {"result": API_VERSION}

    @api.get("/model")
    def model() -> Dict[str, str]:
        engine = session.engine
        return {"result": engine.name if engine is not None else "ReadOnly"}

    @api.get("/config/max_context_length")
    def max_context_length() -> Dict[str, int]:
        return {"value": _context_of(session.engine)}

    @api.get("/config/max_length")
    def max_length() -> Dict[str, int]:
        return {"value": read_generation({"prompt": ""}).settings[0].max_length}

    @api.get("/config/soft_prompt")
    def get_soft_prompt() -> Dict[str, str]:
        return {"value": next(iter(session.selection), "")}

    @api.put("/config/soft_prompt")
    def put_soft_prompt() -> Any:
        filename = _body(SOFT_PROMPT)["value"]
        try:
            session.select(filename if filename.strip() else "")
        except SoftPromptError as error:
            return invalid_fields({"value": [str(error)]})
        return {}

    @api.get("/config/soft_prompts_list")
    def soft_prompts_list() -> Dict[str, List[Dict[str, str]]]:
        return {"values": [{"value": entry.filename} for entry in session.entries() if entry.verdict.usable]}

    @api.post("/generate")
    def generate() -> Any:
        texts = Texts(queue)
        try:
            texts.begin(read_generation(read_object(request.get_data())), session, characters)
            for _ in texts.events():
                pass
        finally:
            texts.close()
        if texts.error is not None:
            return refusal(texts.error)
        return {"results": [_result(each) for each in texts.generations]}

    return api


def _extra_api(session: Session, queue: GenerationQueue, characters: Characters, protected: bool) -> Blueprint:
    api = Blueprint("extra", __name__)
    since = time.monotonic()

    @api.get("/version")
    def version() -> Dict[str, Any]:
        lacking = dict.fromkeys(("txt2img", "vision", "transcribe", "multiplayer", "websearch", "tts"), False)
        return {"result": "KoboldCpp", "version": KOBOLDCPP_VERSION, "protected": protected, **lacking}

    @api.post("/generate/stream")
    def generate_stream() -> Response:
        texts = Texts(queue)
        wanted = read_generation(read_object(request.get_data()))
        try:
            texts.begin(wanted._replace(settings=wanted.settings[:1]), session, characters)
            texts.wait_for_first()
        except BaseException:
            texts.close()
            raise
        if texts.error is not None:
            return refusal(texts.error)
        return stream(texts, lambda: _kobold_events(texts))

    @api.route("/generate/check", methods=["GET", "POST"])
    def check() -> Dict[str, Any]:
        key = _body(KEY).get("genkey", "") if request.method == "POST" else ""
        return {"results": [{"text": queue.text_so_far(key, client_name())}]}

    @api.post("/abort")
    def abort() -> Dict[str, str]:
        meant = queue.meant(_body(KEY).get("genkey", ""), client_name())
        for generation in meant:
            queue.stop(generation)
        return {"success": "true" if meant else "false", "done": "true"}

    @api.post("/tokencount")
    def tokencount() -> Dict[str, Any]:
        text = _body(TOKENS).get("prompt", "")
        engine = session.engine
        if engine is None:
            raise NoModel(NO_MODEL)
        with suppress(
            SoftPromptError
        ):  # a tag that nobody can read is refused where text is asked for; here it is text
            text = read_tags(text, session.named)
        ids = engine.token_ids(text) if isinstance(engine, Tokenizing) else []
        return {"value": len(ids), "ids": without_soft_tokens(ids)}

    @api.get("/true_max_context_length")
    def true_max_context_length() -> Dict[str, int]:
        return {"value": _context_of(session.engine)}

    @api.get("/preloadstory")
    def preloadstory() -> Dict[str, Any]:
        return {}

    @api.get("/perf")
    def perf() -> Dict[str, Any]:
        settings, ending, (process, evaluate) = queue.last or (None, None, (0.0, 0.0))
        n_new = ending.n_new if ending is not None else 0
        return {
            "last_process": process,
            "last_eval": evaluate,
            "last_token_count": n_new,
            "last_seed": -1 if settings is None or settings.seed is None else settings.seed,
            "total_gens": queue.n_ended,
            "stop_reason": -1 if ending is None else int(ending.reason == "stop"),
            "queue": len(queue),
            "idle": int(not len(queue)),
            "uptime": time.monotonic() - since,
        }

    return api


def _softprompts_api(session: Session, characters: Characters) -> Blueprint:
    api = Blueprint("softprompts", __name__)

    @api.get("")
    def softprompts() -> Dict[str, Any]:
        session.refresh()
        return session.status()

    @api.put("")
    def select() -> Any:
        names = _body(SELECTION)["selection"]
        try:
            session.select(names)
        except SoftPromptError as error:
            return invalid_fields({"selection": [str(error)]})
        return session.status()

    @api.get("/characters")
    def get_characters() -> Dict[str, Any]:
        return {"characters": characters.all()}

    @api.put("/characters")
    def put_character() -> Any:
        values = _body(CHARACTER)
        names = values.get("soft_prompt", ())
        try:
            for name in names:
                session.softprompt(name)
        except SoftPromptError as error:
            return invalid_fields({"soft_prompt": [str(error)]})
        try:
            characters.keep(values["character"], names)
        except SoftPromptError as error:
            return invalid_fields({"character": [str(error)]})
        return {"characters": characters.all()}

    return api


def _kobold_events(texts: Texts) -> Iterator[str]:
    """One text as server-sent events, each exactly as KoboldAI Lite reads it."""
    for said in texts.events():
        if not said.ended:
            yield f"event: message\ndata: {as_json({'token': said.text, 'finish_reason': None})}\n\n"
        elif said.generation.error is not None:
            yield f"event: error\ndata: {as_json(status_of(said.generation.error)[1])}\n\n"
        else:
            yield f"event: message\ndata: {as_json({'token': '', 'finish_reason': said.generation.reason})}\n\n"


def _result(generation: Generation) -> Dict[str, Any]:
    """One text; ``notices``, where there are some: what the engine did not do of what was asked for."""
    notices = {"notices": list(generation.notices)} if generation.notices else {}
    return {"text": generation.text, "finish_reason": generation.reason, **notices}


def _body(table: Dict[str, Field]) -> Dict[str, Any]:
    """The request's fields, checked; whatever content type it says, or none."""
    return read(table, read_object(request.get_data()))


def _context_of(engine: Optional[Engine]) -> int:
    return (engine.context if engine is not None else None) or _CONTEXT
