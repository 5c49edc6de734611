"""The OpenAPI document: made of the tables that check the requests."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..session import MOST_SELECTED
from .fields import (
    CHARACTER,
    CHAT,
    COMPLETION,
    GENERATION,
    KEY,
    SELECTION,
    SOFT_PROMPT,
    TOKENS,
    Field,
)

_STRING: Dict[str, Any] = {"type": "string"}
_EVENT: Dict[str, Any] = {"type": "object", "properties": {"event": _STRING, "data": _STRING}}
_NAMES: Dict[str, Any] = {"type": "array", "items": _STRING}


class _Operation(NamedTuple):
    method: str
    path: str
    summary: str
    answer: Dict[str, Any]
    """The schema of status 200."""
    fields: Optional[Dict[str, Field]] = None
    """Of the body; None: there is none."""
    errors: Tuple[int, ...] = ()
    is_stream: bool = False


def _object(**properties: Dict[str, Any]) -> Dict[str, Any]:
    """An object of these and perhaps other properties."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _list_of(schema: Dict[str, Any]) -> Dict[str, Any]:
    return {"type": "array", "items": schema}


_WHOLE: Dict[str, Any] = {"type": "integer"}
_ANYTHING: Dict[str, Any] = {"type": "object"}
_VALUE = _object(value=_STRING)
_COUNT = _object(value=_WHOLE)
_RESULT = _object(result=_STRING)
_REASON = {"type": "string", "enum": ["stop", "length"]}
_RESULTS = _object(results=_list_of(_object(text=_STRING)))
_STATUS = _object(model=_STRING, selection=_NAMES, n_tokens=_WHOLE, notice=_STRING, entries=_list_of(_ANYTHING))
_CHARACTERS = _object(characters={"type": "object", "additionalProperties": _NAMES})
_DETAIL = _object(detail=_object(msg=_STRING, type=_STRING))
_WRONG_FIELDS = _object(detail={"type": "object", "additionalProperties": _list_of(_STRING)})
_OPENAI_ERROR = _object(error=_object(message=_STRING, type=_STRING))
_GENERATING = (422, 500, 501, 503, 507)
_OPENAI_GENERATING = (400, *_GENERATING)

_ERRORS: Dict[int, Tuple[str, Dict[str, Any]]] = {
    400: ("A field that is wrong", _DETAIL),
    413: ("A body that is too large", _DETAIL),
    422: ("A field that is wrong, or a text that does not fit", {"anyOf": [_WRONG_FIELDS, _DETAIL]}),
    500: ("A failure inside the model", _DETAIL),
    501: ("No model is loaded", _DETAIL),
    503: ("The queue is full, the server is closing, or what generates does not answer", _DETAIL),
    507: ("Out of memory", _DETAIL),
}

_KOBOLDAI = (
    _Operation("get", "/info/version", "The API's version", _RESULT),
    _Operation("get", "/model", "The model's name, or ReadOnly", _RESULT),
    _Operation("get", "/config/max_context_length", "Tokens of context", _COUNT),
    _Operation("get", "/config/max_length", "New tokens where a request does not say", _COUNT),
    _Operation("get", "/config/soft_prompt", "The soft prompt that is selected", _VALUE),
    _Operation("put", "/config/soft_prompt", "Select a soft prompt", _ANYTHING, SOFT_PROMPT, (422, 501)),
    _Operation("get", "/config/soft_prompts_list", "Soft prompts that fit", _object(values=_list_of(_VALUE))),
    _Operation("post", "/generate", "Continue a text; `notices`: what was left out", _RESULTS, GENERATION, _GENERATING),
)

_OPERATIONS = (
    *(each._replace(path="/api/v1" + each.path) for each in _KOBOLDAI),
    *(each._replace(path="/api/latest" + each.path) for each in _KOBOLDAI),
    _Operation("get", "/api/extra/version", "KoboldCpp's version", _object(result=_STRING, version=_STRING)),
    _Operation(
        "post",
        "/api/extra/generate/stream",
        "Continue a text, as server-sent events: `event: message`, `data: {token, finish_reason}`",
        _EVENT,
        GENERATION,
        _GENERATING,
        is_stream=True,
    ),
    _Operation("get", "/api/extra/generate/check", "The text so far", _RESULTS),
    _Operation("post", "/api/extra/generate/check", "The text so far", _RESULTS, KEY, (422,)),
    _Operation("post", "/api/extra/abort", "Stop", _object(success=_STRING, done=_STRING), KEY, (422,)),
    _Operation(
        "post",
        "/api/extra/tokencount",
        "Count the tokens of a text: `value` with those of soft prompts in it, which have no `ids`",
        _object(value=_WHOLE, ids=_list_of(_WHOLE)),
        TOKENS,
        (422, 501),
    ),
    _Operation("get", "/api/extra/true_max_context_length", "Tokens of context", _COUNT),
    _Operation("get", "/api/extra/preloadstory", "A story to begin with: none", _ANYTHING),
    _Operation("get", "/api/extra/perf", "Numbers of the last text", _object(queue=_WHOLE, idle=_WHOLE)),
    _Operation("get", "/api/extra/softprompts", "All soft prompts with their verdicts; the selection", _STATUS),
    _Operation("put", "/api/extra/softprompts", "Select soft prompts, in order", _STATUS, SELECTION, (422, 501)),
    _Operation("get", "/api/extra/softprompts/characters", "The soft prompts of characters", _CHARACTERS),
    _Operation(
        "put", "/api/extra/softprompts/characters", "Keep a character's soft prompts", _CHARACTERS, CHARACTER, (422,)
    ),
    _Operation("get", "/v1/models", "The model", _object(data=_list_of(_object(id=_STRING)))),
    _Operation(
        "post",
        "/v1/completions",
        "Continue a text (OpenAI)",
        _object(choices=_list_of(_object(text=_STRING, finish_reason=_REASON))),
        COMPLETION,
        _OPENAI_GENERATING,
        is_stream=True,
    ),
    _Operation(
        "post",
        "/v1/chat/completions",
        "Answer in a conversation (OpenAI)",
        _object(choices=_list_of(_object(message=_object(role=_STRING, content=_STRING), finish_reason=_REASON))),
        CHAT,
        _OPENAI_GENERATING,
        is_stream=True,
    ),
)


def document(version: str, usable: Sequence[str]) -> Dict[str, Any]:
    """The OpenAPI document, as JSON holds it; ``usable``: file names that a soft prompt may be given by."""
    paths: Dict[str, Dict[str, Any]] = {}
    for each in _OPERATIONS:
        paths.setdefault(each.path, {})[each.method] = _operation(each, usable)
    info = {"title": "kobold_sp_plugin", "version": version, "description": "KoboldAI's API, and soft prompts"}
    return {"openapi": "3.0.3", "info": info, "servers": [{"url": "/"}], "paths": paths}


def _operation(operation: _Operation, usable: Sequence[str]) -> Dict[str, Any]:
    is_openai = operation.path.startswith("/v1/")
    content = {"application/json": {"schema": operation.answer}}
    if operation.is_stream:
        stream = {"text/event-stream": {"schema": _EVENT}}
        content = {**content, **stream} if is_openai else stream
    answers: Dict[str, Any] = {"200": {"description": "It is done", "content": content}}
    for status in operation.errors + ((413,) if operation.fields else ()):
        sentence, schema = _ERRORS[status]
        schema = _OPENAI_ERROR if is_openai else schema
        answers[str(status)] = {"description": sentence, "content": {"application/json": {"schema": schema}}}
    name = operation.path.strip("/").replace("/", "_").replace(".", "_")
    made = {"operationId": f"{operation.method}_{name}", "summary": operation.summary, "responses": answers}
    if operation.fields is not None:
        required = any(field.required for field in operation.fields.values())
        schema = _schema(operation.fields, usable)
        made["requestBody"] = {"required": required, "content": {"application/json": {"schema": schema}}}
    return made


def _schema(fields: Dict[str, Field], usable: Sequence[str]) -> Dict[str, Any]:
    """A body of these fields; others make no difference."""
    properties = {}
    for name, field in fields.items():
        schema = dict(field.kind.schema)
        if name in ("soft_prompt", "selection") or fields is SOFT_PROMPT:
            schema = _softprompts(usable, several=fields is not SOFT_PROMPT)
        if not field.required:
            schema["nullable"] = True
        properties[name] = {**schema, "description": field.meaning}
    required: List[str] = [name for name, field in fields.items() if field.required]
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _softprompts(usable: Sequence[str], several: bool) -> Dict[str, Any]:
    blank = {"type": "string", "pattern": r"^\s*$"}
    one = {"anyOf": [{"type": "string", "enum": list(usable)}, blank]} if usable else blank
    return {"anyOf": [one, {"type": "array", "items": one, "maxItems": MOST_SELECTED}]} if several else dict(one)
